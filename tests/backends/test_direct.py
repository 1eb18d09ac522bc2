"""The short way to the compiled kernels: the op's own maps where it serves, and the op where it does not."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import diffcam_fast as dcf
from diffcam_fast.backends import absent_because, direct, use_backend
from tests.ops.test_cam import _tensors, problems

pytestmark = [
    pytest.mark.skipif(not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="PyTorch offers no exchange in C"),
    pytest.mark.skipif(absent_because("cpu") is not None, reason=f"no compiled kernels: {absent_because('cpu')}"),
]

OP = torch.ops.diffcam_fast.cam.default
ACTIVATIONS = torch.rand(2, 8, 7, 5)
GRADIENTS = torch.randn(2, 8, 7, 5)
MAPS = OP(ACTIVATIONS, GRADIENTS.unsqueeze(1), "gradcam", True, "minmax", 1e-7).squeeze(1)


def _call(
    activations: Any = ACTIVATIONS,
    gradients: Any = GRADIENTS,
    method: Any = "gradcam",
    relu: Any = True,
    normalize: Any = "minmax",
    eps: Any = 1e-7,
    targets: bool = False,
) -> Tensor | None:
    return direct.cam(activations, gradients, method, relu, normalize, eps, targets)


@given(problem=problems())
@pytest.mark.usefixtures("poisoned_memory")
def test_maps_are_those_of_the_op(problem: dict) -> None:
    activations, gradients = _tensors(problem)
    options = (problem["method"], problem["relu"], problem["normalize"], 1e-7)
    expected = OP(activations, gradients, *options)
    normalize = None if problem["normalize"] == "none" else problem["normalize"]
    served = _call(activations, gradients, problem["method"], problem["relu"], normalize, targets=True)
    assert served is not None
    torch.testing.assert_close(served, expected, rtol=0, atol=0, equal_nan=True)
    assert served.dtype == expected.dtype and served.stride() == expected.stride()
    # Without a target dimension, and by the shape alone, where one dimension of space does not make it ambiguous.
    if problem["targets"] == 1:
        torch.testing.assert_close(
            _call(activations, gradients[:, 0], problem["method"], problem["relu"], normalize),
            expected[:, 0],
            rtol=0,
            atol=0,
            equal_nan=True,
        )
    elif gradients.shape != activations.shape:
        by_shape = _call(activations, gradients, problem["method"], problem["relu"], normalize)
        torch.testing.assert_close(by_shape, expected, rtol=0, atol=0, equal_nan=True)


def test_one_dimension_of_space_is_read_as_documented() -> None:
    activations, gradients = torch.rand(2, 4, 4), torch.randn(2, 4, 4)
    assert torch.equal(
        _call(activations, gradients), OP(activations, gradients[:, None], "gradcam", True, "minmax", 1e-7)[:, 0]
    )
    constant = _call(activations, gradients, targets=True)
    assert torch.equal(constant, OP(activations, gradients, "gradcam", True, "minmax", 1e-7))
    assert constant.shape == (2, 4, 4)


@pytest.mark.parametrize("count", [1, 2])
def test_threads_of_pytorch_are_used_and_change_nothing(count: int) -> None:
    before = torch.get_num_threads()
    activations, gradients = torch.rand(8, 64, 28, 28), torch.randn(8, 64, 28, 28)
    expected = OP(activations, gradients.unsqueeze(1), "gradcam", True, "minmax", 1e-7).squeeze(1)
    try:
        torch.set_num_threads(count)
        assert torch.equal(_call(activations, gradients), expected)
    finally:
        torch.set_num_threads(before)


def test_the_public_function_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(direct, "cam", lambda *arguments: calls.append(arguments) or MAPS)
    assert dcf.cam(ACTIVATIONS, GRADIENTS) is MAPS
    assert len(calls) == 1


def test_maps_are_ordinary_tensors() -> None:
    maps = _call()
    maps.add_(1)
    assert maps._version == 1 and not maps.requires_grad and maps.is_contiguous()
    assert str(maps.device) == "cpu" and maps.storage_offset() == 0 and maps.data_ptr() % 64 == 0
    assert not maps.is_inference()
    with torch.inference_mode():
        assert _call().is_inference()


def test_empty_tensors() -> None:
    assert _call(torch.empty(0, 8, 7, 5), torch.empty(0, 8, 7, 5)).shape == (0, 7, 5)
    assert _call(torch.empty(2, 8, 0, 5), torch.empty(2, 8, 0, 5)).shape == (2, 0, 5)
    assert torch.equal(_call(torch.empty(2, 0, 7, 5), torch.empty(2, 0, 7, 5)), torch.zeros(2, 7, 5))


def test_maps_that_do_not_fit_in_memory() -> None:
    activations = torch.ones(1, 1, 1).expand(1, 1, 2**52)
    with pytest.raises(RuntimeError, match=r"(?i)memory"):
        dcf.cam(activations, torch.ones(1, 1))


NOT_SERVED: dict[str, Callable[[], Tensor | None]] = {
    "negated on the way": lambda: _call(torch._neg_view(ACTIVATIONS)),
    "sparse": lambda: _call(ACTIVATIONS.to_sparse()),
    "another layout": lambda: _call(ACTIVATIONS.to_mkldnn()),
    "another device": lambda: _call(ACTIVATIONS.to("meta"), GRADIENTS.to("meta")),
    "integers": lambda: _call(ACTIVATIONS.int(), GRADIENTS.int()),
    "complex numbers": lambda: _call(ACTIVATIONS.cfloat(), GRADIENTS.cfloat()),
    "two dtypes": lambda: _call(ACTIVATIONS.double()),
    "two dtypes of one size": lambda: _call(ACTIVATIONS.half(), GRADIENTS.bfloat16()),
    "a subclass": lambda: _call(torch.nn.Parameter(ACTIVATIONS, requires_grad=False)),
    "no tensor": lambda: _call(ACTIVATIONS.numpy()),
    "gradients to record": lambda: _call(ACTIVATIONS.clone().requires_grad_()),
    "images that differ": lambda: _call(gradients=GRADIENTS[:1]),
    "channels that differ": lambda: _call(gradients=GRADIENTS[:, :3]),
    "positions that differ": lambda: _call(gradients=GRADIENTS[..., :3]),
    "too few dimensions": lambda: _call(ACTIVATIONS[0, 0], GRADIENTS[0, 0]),
    "too many dimensions": lambda: _call(ACTIVATIONS[None, None, None], GRADIENTS[None, None, None]),
    "no target dimension": lambda: _call(targets=True),
    "an unknown method": lambda: _call(method="scorecam"),
    "a method with a zero behind it": lambda: _call(method="gradcam\0"),
    "a normalisation with a zero behind it": lambda: _call(normalize="minmax\0"),
    "a method that is no text": lambda: _call(method=3),
    "a method that is no Unicode": lambda: _call(method="\ud800"),
    "an unknown normalisation": lambda: _call(normalize="zscore"),
    "the op's own name for none": lambda: _call(normalize="none"),
    "a number for a flag": lambda: _call(relu=1),
    "eps of zero": lambda: _call(eps=0.0),
    "eps that is not a number": lambda: _call(eps=math.nan),
    "a whole number for eps": lambda: _call(eps=1),
    "no arguments": lambda: direct.cam(),
}


@pytest.mark.parametrize("call", NOT_SERVED.values(), ids=NOT_SERVED)
def test_what_is_not_plain_is_not_served(call: Callable[[], Tensor | None]) -> None:
    assert call() is None


def test_recording_is_a_matter_of_the_mode() -> None:
    activations = ACTIVATIONS.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(_call(activations), MAPS)
    assert dcf.cam(activations, GRADIENTS).grad_fn is not None


def test_a_view_that_is_negated_on_the_way_counts_as_its_values() -> None:
    expected = dcf.cam(-ACTIVATIONS, GRADIENTS)
    assert not torch.equal(expected, MAPS)
    assert torch.equal(dcf.cam(torch._neg_view(ACTIVATIONS), GRADIENTS), expected)


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += str(func)
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += str(func)
        return func(*args, **(kwargs or {}))


def _seen_by(mode: _Dispatched | _Called) -> bool:
    with mode:
        dcf.cam(ACTIVATIONS, GRADIENTS)
    return "diffcam_fast.cam" in mode.seen


def _profiled() -> bool:
    with torch.autograd.profiler.profile() as profile:
        dcf.cam(ACTIVATIONS, GRADIENTS)
    return "diffcam_fast::cam" in {event.key for event in profile.key_averages()}


LOGITS = torch.randn(2, 6)
CLASSES = torch.tensor([[1, 5, 0], [2, 2, 3]])
LOGIT_DIFFERENCE = torch.ops.diffcam_fast.logit_difference.default


def _difference(
    logits: Any = LOGITS,
    classes: Any = CLASSES,
    baseline: Any = "logsumexp",
    top_k: Any = None,
    temperature: Any = 1.0,
    alpha: Any = 1.0,
    ranks: Any = (1, 2, 3),
) -> tuple[Tensor | None, ...] | None:
    return direct.logit_difference(logits, classes, baseline, top_k, temperature, alpha, ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", [None, 1, 4])
@pytest.mark.parametrize(
    ("baseline", "options"),
    [
        ("max", {}),
        ("mean", {"top_k": 1}),
        ("logsumexp", {"top_k": 36}),
        ("logsumexp", {"temperature": 0.5}),
        ("expected", {"top_k": 4, "temperature": 2.0}),
        ("finer", {}),
        ("finer", {"alpha": 0.6, "ranks": (36, 1)}),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_differences_are_those_of_the_op(
    baseline: str, options: dict[str, Any], targets: int | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(37, 5, generator=generator).to(dtype).t()
    classes = torch.randint(37, (5, targets or 1), generator=generator)
    ranks = options.get("ranks", (1, 2, 3)) if baseline == "finer" else ()
    settings = (options.get("top_k") or 0, options.get("temperature", 1.0), options.get("alpha", 1.0), [*ranks])
    expected = LOGIT_DIFFERENCE(logits, classes, baseline, *settings)
    served = _difference(logits, classes if targets else classes[:, 0], baseline, **options)
    assert served is not None
    compared = settings[0] + len(ranks)
    for found, right in zip(served, expected, strict=True):
        if found is None:
            assert compared == 0 and right.numel() == 0
            continue
        right = right if targets else right.squeeze(1)
        torch.testing.assert_close(found, right, rtol=0, atol=0)
        assert found.dtype == right.dtype and found.is_contiguous()
    assert (served[2] is None) == (compared == 0)
    public = dcf.logit_difference(logits, classes if targets else classes[:, 0], baseline=baseline, **options)
    assert torch.equal(public.cotangent, served[1])


DIFFERENCES_NOT_SERVED: dict[str, Callable[[], Any]] = {
    "one class": lambda: _difference(LOGITS[:, :1], torch.zeros(2, 1, dtype=torch.int64)),
    "a class too many": lambda: _difference(classes=torch.tensor([[0], [6]])),
    "a class below zero": lambda: _difference(classes=torch.tensor([[0], [-1]])),
    "narrow indices": lambda: _difference(classes=CLASSES.int()),
    "indices that are no integers": lambda: _difference(classes=CLASSES.double()),
    "indices that are not next to each other": lambda: _difference(classes=torch.zeros(4, 2, dtype=torch.int64).t()),
    "images that differ": lambda: _difference(classes=CLASSES[:1]),
    "too many dimensions": lambda: _difference(LOGITS[None]),
    "gradients to record": lambda: _difference(LOGITS.clone().requires_grad_()),
    "an unknown baseline": lambda: _difference(baseline="median"),
    "a baseline with a zero behind it": lambda: _difference(baseline="max\0"),
    "no rival": lambda: _difference(top_k=0),
    "more rivals than there are": lambda: _difference(top_k=6),
    "more rivals than fit": lambda: _difference(top_k=2**64),
    "a truth value for a number": lambda: _difference(top_k=True),
    "a temperature that does not apply": lambda: _difference(baseline="max", temperature=2.0),
    "a temperature below zero": lambda: _difference(temperature=-1.0),
    "a temperature without end": lambda: _difference(temperature=math.inf),
    "alpha that does not apply": lambda: _difference(alpha=0.5),
    "ranks that do not apply": lambda: _difference(ranks=(1, 2)),
    "rivals beside ranks": lambda: _difference(baseline="finer", top_k=2),
    "a rank twice": lambda: _difference(baseline="finer", ranks=(1, 1)),
    "a rank of zero": lambda: _difference(baseline="finer", ranks=(0, 1)),
    "a rank too many": lambda: _difference(baseline="finer", ranks=(6,)),
    "no ranks": lambda: _difference(baseline="finer", ranks=()),
    "ranks in a list": lambda: _difference(baseline="finer", ranks=[1, 2]),
    "ranks that are no numbers": lambda: _difference(baseline="finer", ranks=("1",)),
    "alpha without end": lambda: _difference(baseline="finer", alpha=math.inf),
    "no arguments": lambda: direct.logit_difference(),
}


@pytest.mark.parametrize("call", DIFFERENCES_NOT_SERVED.values(), ids=DIFFERENCES_NOT_SERVED)
def test_differences_that_are_not_served(call: Callable[[], Any]) -> None:
    assert _difference() is not None
    assert call() is None


WATCHERS: dict[str, Callable[[], bool]] = {
    "a dispatch mode": lambda: _seen_by(_Dispatched()),
    "a function mode": lambda: _seen_by(_Called()),
    "a profiler": _profiled,
    "a trace": lambda: "diffcam_fast::cam" in str(torch.jit.trace(dcf.cam, (ACTIVATIONS, GRADIENTS)).graph),
    "a proxy": lambda: "diffcam_fast.cam" in make_fx(lambda a, g: dcf.cam(a, g))(ACTIVATIONS, GRADIENTS).code,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("sees_the_op", WATCHERS.values(), ids=WATCHERS)
def test_whoever_watches_sees_the_op(sees_the_op: Callable[[], bool]) -> None:
    assert _call() is not None
    assert sees_the_op()
    assert _call() is not None


def test_a_transform_gets_the_op() -> None:
    def served(values: Tensor) -> Tensor:
        # What is transformed, and what is plain but for the transform around it.
        found.extend([_call(values, values), _call()])
        return values

    found: list[Tensor | None] = []
    torch.func.vmap(served)(torch.rand(3, *ACTIVATIONS.shape))
    assert found == [None, None]


def test_a_forced_backend_is_not_passed_by() -> None:
    with use_backend("reference"):
        assert not direct.is_serving() and _call() is None
    with use_backend("cpu"):
        assert direct.is_serving() and torch.equal(_call(), MAPS)
    assert direct.is_serving()


def test_without_what_it_needs_of_pytorch_the_op_serves() -> None:
    """And `diffcam info` says what is missing."""
    code = (
        "import torch; del torch.Tensor.__dlpack_c_exchange_api__\n"
        "import diffcam_fast; from diffcam_fast import info\n"
        "assert not diffcam_fast.backends.direct.is_serving()\n"
        "values = torch.ones(1, 2, 3)\n"
        "assert diffcam_fast.cam(values, values).shape == (1, 3)\n"
        "print(info.format_report(info.report()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = [line for line in run.stdout.splitlines() if "direct calls" in line]
    assert "absent" in line and "__dlpack_c_exchange_api__" in line


def test_another_capsule_is_not_taken() -> None:
    connect = importlib.import_module("diffcam_fast._C").connect
    assert not connect(Tensor, object(), 0, torch.is_grad_enabled, Tensor.is_neg, ())
    assert torch.equal(_call(), MAPS)


def test_many_threads_at_a_time() -> None:
    wrong = []

    def work() -> None:
        for _ in range(200):
            if not torch.equal(_call(), MAPS):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
