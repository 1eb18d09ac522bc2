"""That the sweeps can fail: each barrier and wait of the kernels is left out in turn, and they notice."""

from __future__ import annotations

import shutil

import pytest

from tests.cuda import sweeps
from tests.cuda_host.__main__ import BARRIER, SWEEPS
from tests.cuda_host.build import KERNELS

#: What may be left out unnoticed, and why.
BENIGN = {
    "cam": {
        "cam.cu team_sync __syncthreads #2": "the barriers of the loop over tiles come before and after it",
        "cam.cu cam_finish_kernel __syncthreads #1": "a block comes by with several maps where thousands are in parts",
    }
}

#: Ops whose threads never wait for each other.
WITHOUT_BARRIERS = {"saliency_contrast"}


@pytest.mark.parametrize("op", SWEEPS)
def test_a_barrier_left_out_is_noticed(builds, op):
    builds[op, False].result()
    verdicts = sweeps.verdicts_on_mutants(op)
    assert bool(verdicts) == (op not in WITHOUT_BARRIERS)
    unnoticed = {site for site, verdict in verdicts.items() if not verdict}
    assert unnoticed == BENIGN.get(op, {}).keys()


def test_a_barrier_taken_out_of_a_copy_is_noticed(tmp_path):
    """The same with a copy of a kernel's source, for one barrier."""
    copy = shutil.copytree(KERNELS, tmp_path / "cuda")
    source = copy / "overlay.cu"
    calls = [call for call in BARRIER.finditer(source.read_text()) if call[1] == "__syncthreads"]
    text = source.read_text()
    last = calls[-1]
    source.write_text(text[: last.start()] + "static_cast<void>(0" + text[last.end() :])
    done = sweeps.run("overlay", "--kernels", copy, "--seeds", "2")
    assert done.returncode == 1 and " 0 failed" not in done.stdout
    assert "AssertionError" not in done.stderr and "cases, " in done.stdout
