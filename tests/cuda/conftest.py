"""Fixtures of the tests of CUDA kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda_host import build_op
from tests.cuda_host.__main__ import SWEEPS


@pytest.fixture(scope="session")
def builds() -> Iterator[dict[tuple[str, bool], Future[Path]]]:
    """Each op's library, by name and whether it is for the sanitizers, compiled while other tests run."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    yield {(op, sanitize): pool.submit(build_op, op, sanitize) for sanitize in (False, True) for op in SWEEPS}
    pool.shutdown(cancel_futures=True)
