"""Lets pytest run the tests of this folder: their cases, and a skip where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.cases import DEVICE, case_name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = getattr(metafunc.function, "cases", None)
    if cases is not None:
        # Where all would be skipped, one of a test is enough to say so.
        cases = cases if _reason() is None else cases[:1]
        names = list(cases[0])
        metafunc.parametrize(names, [tuple(case.values()) for case in cases], ids=[case_name(case) for case in cases])


@pytest.fixture(autouse=True)
def _device() -> None:
    reason = _reason()
    if reason is not None:
        pytest.skip(reason)


def _reason() -> str | None:
    return "no CUDA device" if DEVICE == "cuda" and not torch.cuda.is_available() else None
