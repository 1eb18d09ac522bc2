"""Differences between logits, with cotangents: schema, shape inference, autograd and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from diffcam_fast.backends import direct
from diffcam_fast.backends.library import NAMESPACE, define
from diffcam_fast.ops.arguments import check_integer, check_number
from diffcam_fast.reference import logit_difference as reference
from diffcam_fast.reference.cam import accumulation_dtype
from diffcam_fast.reference.logit_difference import BASELINES, TEMPERED

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class LogitDifferenceResult(NamedTuple):
    """What `logit_difference` returns; without the target dimension T where `classes` had none."""

    delta: Tensor
    """(N, T): the class's logit less the baseline of its rivals, in logits."""

    cotangent: Tensor
    """(N, T, K): gradient of `delta` with respect to the logits."""

    rivals: Tensor | None
    """(N, T, k), int64: the rivals compared, ordered as `logit_difference` says; None: all of them."""

    differences: Tensor | None
    """(N, T, k): the class's logit less each of `rivals`' logits."""


def logit_difference(
    logits: Tensor,
    classes: Tensor,
    *,
    baseline: str = "logsumexp",
    top_k: int | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ranks: Sequence[int] = (1, 2, 3),
) -> LogitDifferenceResult:
    """What tells a class from its rivals: the difference of their logits, and that difference's gradient.

    ``delta = z_c - beta(z_F)`` for class ``c`` and its rivals ``F``: all other classes, or the ``top_k`` of them
    with the largest logits, ties to the lower index.

    =============  =========================================================================================
    baseline       ``beta``
    =============  =========================================================================================
    max            the strongest rival
    mean           ``mean_F z``
    logsumexp      ``tau log sum_F exp(z / tau)``; over all rivals at ``tau = 1`` the difference is
                   ``log(p / (1 - p))``, with ``p`` the class's probability
    expected       ``sum_F softmax(z / tau) z``
    finer          FinerCAM (Zhang et al. 2025) as pytorch-grad-cam defines it:
                   ``delta = sum_i p_i (z_c - alpha z_i) / (sum_i p_i + 1e-9)`` over the classes ``i``
                   ranked ``ranks`` by ``|z_i - z_c|`` (1 = nearest, ``c`` not counted, ties to the lower
                   index), with ``p`` the softmax over all classes
    =============  =========================================================================================

    The cotangent is computed in closed form from differences between logits: it sums to zero over the classes
    however large a number the network adds to all of them ("finer": where ``alpha = 1``), and explanations
    pulled back from it do not depend on that number. The contrast of a class with its rivals is that of
    DiffGradCAM, whose public text leaves the baseline open; the choice of baselines is this library's.

    Sums are taken in float32 whatever the dtype of the logits (float64 for float64). All results but the rivals
    are differentiable in the logits. An image with non-finite logits does not affect others. Nothing waits for
    a device, so only on the CPU are the classes themselves checked before they are used.

    Args:
        logits: ``(N, K)``, at least two classes; float32, float64, bfloat16 or float16.
        classes: ``(N,)``, or ``(N, T)`` for T targets an image; integers in ``[0, K)`` on the logits' device.
        baseline: see the table.
        top_k: how many of the strongest rivals the baseline folds, 1 to K - 1; None: all. Not for "finer".
        temperature: ``tau``, positive; only for "logsumexp" and "expected".
        alpha: only for "finer".
        ranks: only for "finer"; different ranks, 1 to K - 1.

    Returns:
        ``delta`` (N, T), ``cotangent`` (N, T, K), ``rivals`` (N, T, k) and ``differences`` (N, T, k), all
        without T where ``classes`` is (N,); int64 for ``rivals``, otherwise float32, or float64 for float64
        logits. ``rivals`` are the ``top_k`` strongest by descending logit, or for "finer" the classes at
        ``ranks`` in the order given; ``differences`` are ``z_c - z_rival``. Both are None where ``top_k`` is
        None and the baseline is not "finer". Their storage may be one that `resize_` cannot make larger.

    Raises:
        TypeError: an argument is not of the type, or a tensor not of a dtype, described above.
        ValueError: shapes do not match, devices differ, a class is out of range, or an option is out of range
            or does not apply to the baseline.
    """
    if not is_dynamo_compiling():
        served = direct.logit_difference(logits, classes, baseline, top_k, temperature, alpha, ranks)
        if served is not None:
            return LogitDifferenceResult(*served)
    check_tensors(logits, classes)
    check_options(logits.shape[1], baseline, top_k, temperature, alpha, ranks)
    check_range(classes, logits.shape[1])

    canonical = (classes if classes.dim() == 2 else classes.unsqueeze(1)).to(torch.int64)
    finer = baseline == "finer"
    arguments = (
        logits,
        canonical,
        baseline,
        0 if top_k is None else int(top_k),
        float(temperature),
        float(alpha),
        [int(rank) for rank in ranks] if finer else [],
    )
    op = getattr(torch.ops, NAMESPACE).logit_difference.default
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and logits.requires_grad):
        results = op(*arguments)
    else:
        # A Python autograd formula costs microseconds even where nothing requires a gradient.
        with torch._C._AutoDispatchBelowAutograd():
            results = op(*arguments)
    delta, cotangent, rivals, differences = results if classes.dim() == 2 else (result.squeeze(1) for result in results)
    if finer or top_k is not None:
        return LogitDifferenceResult(delta, cotangent, rivals, differences)
    return LogitDifferenceResult(delta, cotangent, None, None)


def check_tensors(logits: Any, classes: Any) -> None:
    """Raise unless logits and classes are tensors whose dtypes, shapes and devices go together."""
    for name, value in (("logits", logits), ("classes", classes)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(value).__name__}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits: expected dtype {_names(DTYPES)}; got {_names([logits.dtype])}")
    if classes.dtype not in INDEX_DTYPES:
        raise TypeError(f"classes: expected dtype {_names(INDEX_DTYPES)}; got {_names([classes.dtype])}")
    if logits.dim() != 2:
        raise ValueError(f"logits: expected shape (N, K); got {tuple(logits.shape)}")
    if logits.shape[1] < 2:
        raise ValueError(f"logits: expected shape (N, K) with at least 2 classes; got {tuple(logits.shape)}")
    if classes.dim() not in (1, 2) or classes.shape[0] != logits.shape[0]:
        raise ValueError(
            f"classes: expected shape ({logits.shape[0]},) or ({logits.shape[0]}, T) "
            f"for logits {tuple(logits.shape)}; got {tuple(classes.shape)}"
        )
    if classes.device != logits.device:
        raise ValueError(f"classes: expected the device of logits, {logits.device}; got {classes.device}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_options(class_count: int, baseline: Any, top_k: Any, temperature: Any, alpha: Any, ranks: Any) -> None:
    """Raise unless the options are valid for logits of so many classes."""
    if baseline not in BASELINES:
        raise ValueError(f"baseline: expected one of {', '.join(BASELINES)}; got {baseline!r}")
    check_number("temperature", temperature)
    check_number("alpha", alpha)
    if isinstance(ranks, str) or not isinstance(ranks, Sequence):
        raise TypeError(f"ranks: expected a sequence of integers; got {type(ranks).__name__}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number; got {temperature!r}")
    if temperature != 1 and baseline not in TEMPERED:
        raise ValueError(
            f"temperature: only for baseline {' and '.join(TEMPERED)}; got {temperature!r} with {baseline!r}"
        )
    if baseline == "finer":
        if top_k is not None:
            raise ValueError(f"top_k: expected None with baseline 'finer', which takes ranks; got {top_k!r}")
        _check_ranks(class_count, ranks)
        return
    if alpha != 1:
        raise ValueError(f"alpha: only for baseline finer; got {alpha!r} with {baseline!r}")
    if tuple(ranks) != (1, 2, 3):
        raise ValueError(f"ranks: only for baseline finer; got {ranks!r} with {baseline!r}")
    if top_k is None:
        return
    check_integer("top_k", top_k)
    if not 1 <= top_k < class_count:
        raise ValueError(
            f"top_k: expected 1 to {class_count - 1}, the number of rivals of a class among {class_count}; got {top_k}"
        )


def _check_ranks(class_count: int, ranks: Sequence[Any]) -> None:
    for rank in ranks:
        check_integer("ranks", rank)
    if len(ranks) == 0 or len(set(ranks)) != len(ranks):
        raise ValueError(f"ranks: expected at least one rank, each once; got {tuple(ranks)}")
    if not all(1 <= rank < class_count for rank in ranks):
        raise ValueError(
            f"ranks: expected ranks from 1 to {class_count - 1}, the number of rivals of a class among "
            f"{class_count}; got {tuple(ranks)}"
        )


def check_range(classes: Tensor, class_count: int) -> None:
    """Raise where a class on the CPU is out of range."""
    # Only where values are at hand: reading them would wait for another device; a tracer's tensors have none.
    if torch.compiler.is_compiling() or type(classes) is not Tensor:
        return
    if classes.device.type != "cpu" or classes.numel() == 0:
        return
    low, high = (int(bound) for bound in classes.aminmax())
    if low < 0 or high >= class_count:
        raise ValueError(
            f"classes: expected indices from 0 to {class_count - 1} for logits of {class_count} classes; "
            f"got indices from {low} to {high}"
        )


define(
    "logit_difference",
    "(Tensor logits, Tensor classes, str baseline, int top_k, float temperature, float alpha, int[] ranks)"
    " -> (Tensor delta, Tensor cotangent, Tensor rivals, Tensor differences)",
    reference.logit_difference,
)


@torch.library.register_fake(f"{NAMESPACE}::logit_difference")
def _fake(
    logits: Tensor,
    classes: Tensor,
    baseline: str,
    top_k: int,
    temperature: float,
    alpha: float,
    ranks: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits.dtype)
    images, targets = classes.shape
    compared = len(ranks) if baseline == "finer" else top_k
    return (
        logits.new_empty((images, targets), dtype=dtype),
        logits.new_empty((images, targets, logits.shape[1]), dtype=dtype),
        classes.new_empty((images, targets, compared)),
        logits.new_empty((images, targets, compared), dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, classes, *ctx.options = inputs
    _, cotangent, rivals, _ = output
    # Saving the cotangent, a result, makes the backward through delta differentiable itself.
    ctx.save_for_backward(logits, classes, cotangent, rivals)
    # Results that do not reach the loss cost nothing in the backward.
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_delta: Tensor | None,
    grad_cotangent: Tensor | None,
    grad_rivals: None,
    grad_differences: Tensor | None,
) -> tuple[Tensor | None, ...]:
    logits, classes, cotangent, rivals = ctx.saved_tensors
    grad = torch.zeros_like(logits, dtype=cotangent.dtype)
    if grad_delta is not None:
        grad = grad + (grad_delta.unsqueeze(-1) * cotangent).sum(1)
    if grad_differences is not None:
        spread = torch.zeros_like(cotangent).scatter(-1, rivals, -grad_differences)
        spread = spread.scatter(-1, classes.unsqueeze(-1), grad_differences.sum(-1, keepdim=True))
        grad = grad + spread.sum(1)
    if grad_cotangent is not None:
        grad = grad + _cotangent_backward(grad_cotangent, logits, classes, *ctx.options)
    return grad.to(logits.dtype), None, None, None, None, None, None


def _cotangent_backward(grad: Tensor, logits: Tensor, classes: Tensor, baseline: str, *options: Any) -> Tensor:
    if baseline in ("max", "mean"):
        return torch.zeros_like(logits, dtype=grad.dtype)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        z = (logits if create_graph else logits.detach()).to(grad.dtype).requires_grad_()
        cotangent = reference.logit_difference(z, classes, baseline, *options)[1]
        (found,) = torch.autograd.grad(cotangent, z, grad, create_graph=create_graph)
    return found


torch.library.register_autograd(f"{NAMESPACE}::logit_difference", _backward, setup_context=_setup_context)
