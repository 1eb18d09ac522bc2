from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

def cam(
    activations: NDArray[Any],
    gradients: NDArray[Any],
    dtype: str,
    method: str,
    relu: bool,
    normalize: str,
    eps: float,
    threads: int,
) -> NDArray[Any]: ...
def logit_difference(
    logits: NDArray[Any],
    classes: NDArray[Any],
    dtype: str,
    baseline: str,
    top_k: int,
    temperature: float,
    alpha: float,
    ranks: list[int],
    threads: int,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def connect(
    tensor: type[Tensor],
    capsule: object,
    threads: int,
    grad_enabled: Callable[[], bool],
    is_negative: Callable[[Tensor], bool],
    watchers: tuple[Callable[[], Any], ...],
) -> bool: ...
def direct_cam(
    activations: Tensor,
    gradients: Tensor,
    method: str,
    relu: bool,
    normalize: str | None,
    eps: float,
    targets: bool,
    /,
) -> Tensor | None: ...
def direct_logit_difference(
    logits: Tensor,
    classes: Tensor,
    baseline: str,
    top_k: int | None,
    temperature: float,
    alpha: float,
    ranks: Sequence[int],
    /,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None: ...
def build_information() -> dict[str, Any]: ...
def cpu_capability() -> str: ...
def best_cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> bool: ...
