"""The CUDA kernels, run as host code, under the address sanitizer and that of undefined behaviour."""

from __future__ import annotations

import pytest

from tests.cuda import sweeps
from tests.cuda_host import preload_sanitizers
from tests.cuda_host.__main__ import SWEEPS


@pytest.mark.parametrize("op", SWEEPS)
def test_sweep_is_clean(builds, op):
    library = builds[op, True].result()
    done = sweeps.run(op, "--library", library, "--every", "5", "--seeds", "1", environment=preload_sanitizers())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert ", 0 failed" in done.stdout
