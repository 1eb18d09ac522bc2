"""The commands of `diffcam` and their options. A further command is one more function with `@app.command()`."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from diffcam_fast.cli.explain import OptionError, explain_photos
from diffcam_fast.cli.settings import Settings
from diffcam_fast.cli.text import displayed, one_line
from diffcam_fast.reference.cam import METHODS

app = typer.Typer(name="diffcam", add_completion=False, pretty_exceptions_enable=False)

# Usage errors of the option parser, whichever parser this version of typer brings.
_ParserError: type[Exception] = typer.BadParameter.__mro__[2]


def run(arguments: list[str]) -> int:
    """Parse the arguments and run the command; errors of what was asked for take one line on the standard error."""
    command = typer.main.get_command(app)
    try:
        return int(command.main(args=arguments, prog_name="diffcam", standalone_mode=False, obj=arguments) or 0)
    except _ParserError as error:
        message = getattr(error, "format_message", error.__str__)()
    except OptionError as error:
        message = str(error)
    except typer.Abort:
        message = "interrupted"
    typer.echo(f"diffcam: {one_line(message)}", err=True)
    return 2


@app.callback()
def _diffcam() -> None:
    """Class activation maps of logit differences: why a network saw this class rather than that one."""


@app.command()
def explain(
    photos: Annotated[
        list[Path], typer.Argument(metavar="PHOTO", help="Photos, or folders that are searched for them.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the results: one folder in it for each photo.")
    ] = Path("diffcam-results"),
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            "-c",
            help="A class to draw an overlay for, by name or index; may be repeated. Without it: the predicted class.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", "-k", help="How many rivals the panel tells the prediction from; 3 without it."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="default, torchvision:NAME, timm:NAME or MODULE:FUNCTION.")
    ] = "default",
    weights: Annotated[
        Path | None, typer.Option(help="State dict for the model. Without it: the model's own pretrained weights.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layer", "-l", help="Layer to explain, by its dotted name; may be repeated. Without it: chosen."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="The layer puts out tokens, as transformers do, and this many of them (class token, registers) "
            "come before those of the positions."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=f"How a map is made: {', '.join(METHODS)}.")] = "gradcam",
    target: Annotated[
        str,
        typer.Option(help="What the overlays explain: difference, finer, logit, probability or log-probability."),
    ] = "difference",
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What target difference compares a class's logit with: logsumexp (default), expected, mean or max."
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of baseline logsumexp and expected; 1 without it.")] = None,
    fit: Annotated[
        str,
        typer.Option(
            help="What the model sees of a photo: crop (the central part, as it was evaluated) or stretch (all of it)."
        ),
    ] = "crop",
    batch_size: Annotated[int, typer.Option(help="How many photos go through the model at a time.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the model: float32, float64, bfloat16 or float16.")] = "float32",
    colormap: Annotated[str, typer.Option(help="Any colormap of matplotlib.")] = "jet",
    opacity: Annotated[float, typer.Option(help="Of the heat where a map is strongest, from 0 to 1.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")] = False,
) -> int:
    """Explain photos: overlays of the classes asked for, a panel of the prediction and its rivals, and a JSON file."""
    settings = Settings(
        output=output,
        classes=tuple(classes or ()),
        top_k=top_k,
        model=model,
        weights=weights,
        layers=tuple(layers or ()),
        tokens=tokens,
        method=method,
        target=target,
        baseline=baseline,
        temperature=temperature,
        fit=fit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        colormap=colormap,
        opacity=opacity,
    )
    # Whatever a model's own code prints must not get between the machine and its JSON.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        explained, failures = explain_photos(photos, settings, announce=not as_json)
    if as_json:
        failed = [{"photo": failure.photo, "error": failure.reason} for failure in failures]
        typer.echo(json.dumps({"output": str(output), "explained": explained, "failed": failed}, indent=2))
    elif failures:
        typer.echo(f"{len(failures)} of {len(failures) + len(explained)} could not be explained:", err=True)
        for failure in failures:
            typer.echo(f"  {displayed(failure.photo)}: {one_line(failure.reason)}", err=True)
    return 1 if failures else 0


@app.command()
def bench(
    context: typer.Context,
    model: Annotated[
        str, typer.Option("--model", "-m", help="default, torchvision:NAME, timm:NAME or MODULE:FUNCTION.")
    ] = "default",
    weights: Annotated[
        Path | None, typer.Option(help="State dict for the model. Without it: the model's own pretrained weights.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option("--layer", "-l", help="Layer to explain, by its dotted name. Without it: chosen."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="The layer puts out tokens, and this many of them come before those of the positions."),
    ] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", "-b", help="Images a batch; may be repeated. Without it: 1, 8.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds and one shape: to see that it works.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results as JSON, CSV and Markdown.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")] = False,
) -> int:
    """Measure this machine: the kernels against read bandwidth, and explained beside plain inference of a model."""
    from diffcam_fast.benchmark import machine
    from diffcam_fast.benchmark.measure import WrongResult
    from diffcam_fast.cli.bench import Bench, BenchSettings, as_record, as_text

    settings = BenchSettings(model, weights, layer, tokens, tuple(batch_sizes or (1, 8)), device, quick, output)
    found = []
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        measurements = Bench(settings, shlex.join(["diffcam", *context.obj]))
        if not as_json:
            environment = measurements.environment
            typer.echo(f"{machine.one_line(environment)}\nserved by the {environment['backend']} backend")
        try:
            for one in measurements.reports():
                found.append(one)
                if not as_json:
                    typer.echo(f"\n{as_text(one)}")
        except WrongResult as error:
            typer.echo(f"diffcam: {one_line(error)}", err=True)
            return 1
    if as_json:
        typer.echo(json.dumps(as_record(found, measurements.environment), indent=2))
    return 0


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> int:
    """Versions, backends, and for each one that is absent the reason."""
    from diffcam_fast.info import format_report, report

    facts = report()
    typer.echo(json.dumps(facts, indent=2) if as_json else format_report(facts))
    return 0
