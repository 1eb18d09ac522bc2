from typing import Any

from numpy.typing import NDArray

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
def build_information() -> dict[str, Any]: ...
def cpu_capability() -> str: ...
def best_cpu_capability() -> str: ...
def set_cpu_capability(name: str) -> bool: ...
