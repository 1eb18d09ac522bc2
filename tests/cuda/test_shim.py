"""The simulated device itself: does what CUDA does, and shows what a kernel does wrong."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.cuda_host import Device, KernelError, build, load, preload_sanitizers
from tests.cuda_host.build import KERNELS
from tests.cuda_host.device import check, pointer

TOYS = Path(__file__).with_name("toy_kernels.cu")
SEEDS = range(8)


def build_toys(folder: Path | None = None, sanitize: bool = False) -> Path:
    source = TOYS if folder is None else folder / TOYS.name
    return build([source], "toys", sanitize, folders=[KERNELS])


@pytest.fixture(scope="module")
def toys() -> ctypes.CDLL:
    return load(build_toys())


@pytest.fixture(autouse=True)
def whole(toys):
    """No test leaves a barrier out for the next."""
    yield
    toys.shim_leave_out(b"", 0)


def line_of(text: str) -> list[int]:
    """Lines of the toy kernels in which `text` stands."""
    return [number for number, line in enumerate(TOYS.read_text().splitlines(), 1) if text in line]


def rotated(toys: ctypes.CDLL, seed: int, in_warp: bool, rounds: int = 5) -> bool:
    """Whether `rotate` is right."""
    blocks, threads = 6, 128
    values = torch.arange(blocks * threads, dtype=torch.float32)
    output = torch.full_like(values, torch.nan)
    device = Device(seed=seed).struct()
    error = toys.run_rotate(
        pointer(values), pointer(output), blocks, threads, rounds, ctypes.c_bool(in_warp), ctypes.byref(device)
    )
    check(toys, error)
    grouped = values.reshape(-1, 32 if in_warp else threads)
    return torch.equal(output, grouped.roll(-rounds * (1 if in_warp else 33), 1).flatten())


def summed_over_cluster(toys: ctypes.CDLL, seed: int, cluster: int = 4) -> bool:
    values = torch.rand(2 * 8, 64)
    values = values.reshape(1, 16, 64)[0][:8]  # the kernel reads by blockIdx.x: both rows of the grid do the same
    output = torch.full_like(values, torch.nan)
    device = Device(seed=seed).struct()
    check(toys, toys.run_cluster_sum(pointer(values), pointer(output), 8, cluster, ctypes.byref(device)))
    ranks = torch.arange(cluster).unsqueeze(-1)
    expected = (values.reshape(-1, cluster, 64) * (ranks + 1)).sum(1, keepdim=True) + ranks
    return torch.allclose(output, expected.reshape(8, 64))


def summed_ahead(toys: ctypes.CDLL, seed: int, rows: int = 9) -> bool:
    values = torch.rand(rows, 128 * 4)
    output = torch.full((128,), torch.nan)
    device = Device(seed=seed).struct()
    check(toys, toys.run_copied_ahead(pointer(values), pointer(output), rows, ctypes.byref(device)))
    return torch.allclose(output, values[:, (torch.arange(128) * 4 + 77) % 512].sum(0))


def summed_by_last_block(toys: ctypes.CDLL, seed: int, blocks: int = 7) -> bool:
    values = torch.randint(100, (blocks, 128), dtype=torch.int32)
    output = torch.full((128,), -1, dtype=torch.int32)
    device = Device(seed=seed).struct()
    check(toys, toys.run_last_block_sums(pointer(values), pointer(output), blocks, ctypes.byref(device)))
    return torch.equal(output, values.sum(0).int())


RUNS = {
    "rotate": lambda toys, seed: rotated(toys, seed, in_warp=False),
    "rotate_in_warp": lambda toys, seed: rotated(toys, seed, in_warp=True),
    "cluster_sum": summed_over_cluster,
    "copied_ahead": summed_ahead,
    "last_block_sums": summed_by_last_block,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RUNS)
def test_right_for_every_seed(toys, name, seed):
    assert RUNS[name](toys, seed)


def barriers(name: str) -> list[int]:
    """Lines of a toy kernel that hold a barrier or a wait."""
    lines = TOYS.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if f"__global__ void {name}(" in line)
    last = next(i for i, line in enumerate(lines) if i > first and line == "}")
    calls = re.compile(r"\b(__syncthreads|__syncwarp|cluster_sync|copy_async_wait<.*>)\(\)")
    return [i + 1 for i in range(first, last) if calls.search(lines[i])]


@pytest.mark.parametrize(("name", "line"), [(name, line) for name in RUNS for line in barriers(name)])
def test_a_barrier_left_out_is_seen(toys, name, line):
    toys.shim_leave_out(TOYS.name.encode(), line)
    assert not all(RUNS[name](toys, seed) for seed in SEEDS)


def test_a_barrier_taken_out_of_a_copy_is_seen(tmp_path):
    """Leaving a barrier out when it is reached is as good as a copy of the kernel without it."""
    text = TOYS.read_text()
    assert "__syncthreads();  // written" in text
    (tmp_path / TOYS.name).write_text(text.replace("__syncthreads();  // written", "", 1))
    mutant = load(build_toys(tmp_path))
    assert not all(rotated(mutant, seed, in_warp=False) for seed in SEEDS)
    assert all(rotated(mutant, seed, in_warp=True) for seed in SEEDS)


def test_every_barrier_is_listed(toys):
    for name in RUNS:
        RUNS[name](toys, 0)
    sites = toys.shim_sites().decode().split()
    assert {f"{TOYS.name}:{line}" for name in RUNS for line in barriers(name)} <= set(sites)


def signed(bits: int) -> int:
    """32 bits as C++ reads them into an int."""
    return bits - (1 << 32) if bits >> 31 else bits


def test_warp_calls(toys):
    torch.manual_seed(0)
    values = torch.randint(1, 99, (64,), dtype=torch.int32)
    output = torch.full((64, 10), -1, dtype=torch.int32)
    device = Device(seed=3).struct()
    check(toys, toys.run_warp_calls(pointer(values), pointer(output), ctypes.byref(device)))
    for warp in range(2):
        v, seen = values[warp * 32 :][:32].tolist(), output[warp * 32 :][:32].tolist()
        votes = sum((v[lane] & 1) << lane for lane in range(32))
        for lane in range(32):
            after = v[lane + 1] if lane < 31 else v[lane]
            assert seen[lane] == [
                v[lane ^ 5],
                v[lane + 3] if lane + 3 < 32 else v[lane],
                v[7],
                v[lane ^ 3],
                v[lane // 16 * 16 + 1],
                signed(votes),
                0,
                1,
                v[lane ^ 1] if lane < 16 else signed(votes & 0xFFFF0000),
                torch.tensor([float(after)], dtype=torch.float64).view(torch.int32)[1].item(),
            ]


MISUSES = {
    0: "deadlock: of the threads of block .*wait in __syncthreads.*wait in a warp call",
    1: "deadlock.*wait in a warp call .thread . with mask ffffffff.*2 have ended",
    2: "mask .* which does not name it",
    3: "meet in different calls",
    4: "copy_async_16 of addresses that are no multiples of 16",
    5: "copy_async_16 to offset 256 of 256 bytes",
    6: "cluster_peer 1 in a cluster of 1",
    7: "wrote beyond its 256 bytes of shared memory",
    10: "deadlock: .*wait in __syncthreads, .*wait in cluster_sync",
}


@pytest.mark.parametrize("kind", MISUSES)
@pytest.mark.parametrize("seed", range(3))
def test_misuse_is_reported(toys, kind, seed):
    memory = torch.zeros(256)
    with pytest.raises(KernelError, match=MISUSES[kind]):
        check(toys, toys.run_misuse(kind, pointer(memory), ctypes.byref(Device(seed=seed).struct())))
    assert rotated(toys, seed, in_warp=False), "the device works after a failure"


# Without PyTorch, which takes long to load under the sanitizers.
SANITIZED = """
import ctypes, sys
memory = (ctypes.c_float * 1000)()
toys, kind, device = ctypes.CDLL(sys.argv[1]), int(sys.argv[2]), ctypes.create_string_buffer(bytes.fromhex(sys.argv[3]))
print("error", toys.run_misuse(kind, memory, device))
"""


@pytest.mark.parametrize(
    ("kind", "report"),
    [(7, "heap-buffer-overflow"), (8, "heap-buffer-overflow"), (9, "misaligned address"), (2, "error 719")],
    ids=("write beyond shared memory", "read beyond shared memory", "unaligned vector", "no report"),
)
def test_sanitizers_report(kind, report):
    library = build_toys(sanitize=True)
    command = [sys.executable, "-c", SANITIZED, str(library), str(kind), bytes(Device().struct()).hex()]
    done = subprocess.run(command, env=preload_sanitizers(), capture_output=True, text=True, timeout=60)
    assert report in done.stdout + done.stderr, done.stderr
    assert (done.returncode == 0) == (report == "error 719")


@pytest.mark.parametrize(
    ("launch", "capability", "reason"),
    [
        ((1, 1, 1056, 0, 1), 90, "1 to 1024 threads"),
        ((1, 1, 0, 0, 1), 90, "1 to 1024 threads"),
        ((1, 1, 48, 0, 1), 90, "whole warps"),
        ((0, 1, 32, 0, 1), 90, "at least one block"),
        ((1, 65536, 32, 0, 1), 90, "65535 along y"),
        ((1, 1, 32, (227 << 10) + 1, 1), 90, "shared memory"),
        ((1, 1, 32, (163 << 10) + 1, 1), 80, "shared memory"),
        ((6, 1, 32, 0, 4), 90, "a divisor"),
        ((17, 1, 32, 0, 17), 90, "1 to 16 blocks"),
        ((4, 1, 32, 0, 4), 80, "capability 90"),
    ],
)
def test_launches_that_a_device_refuses(toys, launch, capability, reason):
    grid_x, grid_y, threads, shared_bytes, cluster = launch
    device = Device(capability=capability).struct()
    with pytest.raises(KernelError, match=reason):
        error = toys.try_launch(grid_x, grid_y, threads, ctypes.c_int64(shared_bytes), cluster, ctypes.byref(device))
        check(toys, error)


def test_the_largest_launches_are_taken(toys):
    device = ctypes.byref(Device().struct())
    check(toys, toys.try_launch(1 << 20, 65535, 1024, ctypes.c_int64(227 << 10), 16, device))


def test_a_launch_begins_when_the_launcher_has_returned(toys):
    assert toys.value_after_launch(ctypes.byref(Device().struct())) == 12


def test_conversions_to_narrow_floats_round_to_nearest_even(toys):
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,)).int()
    narrow = torch.arange(65536).short()
    halves = narrow.view(torch.float16).float()
    # Exactly between two neighbours, where ties are broken; and beside that.
    middle = (halves + narrow.add(1).view(torch.float16).float()) / 2
    bfloat16_middle = (narrow.int() << 16) + 0x8000
    values = torch.cat([bits, bfloat16_middle]).view(torch.float32)
    values = torch.cat([values, halves, middle, middle * (1 + 2**-20), middle * (1 - 2**-20)]).contiguous()
    bfloat16s, float16s = torch.empty(2, len(values), dtype=torch.int16)
    toys.convert(pointer(values), ctypes.c_int64(len(values)), pointer(bfloat16s), pointer(float16s))
    numbers = ~values.isnan()
    assert torch.equal(bfloat16s[numbers], values.bfloat16().view(torch.int16)[numbers])
    assert torch.equal(float16s[numbers], values.half().view(torch.int16)[numbers])
    assert (bfloat16s[~numbers] == 0x7FFF).all() and (float16s[~numbers] == 0x7FFF).all()


def test_conversions_from_narrow_floats(toys):
    from_bfloat16, from_half = torch.empty(2, 65536)
    toys.convert_back(pointer(from_bfloat16), pointer(from_half))
    narrow = torch.arange(65536).short()
    for seen, dtype in ((from_bfloat16, torch.bfloat16), (from_half, torch.float16)):
        torch.testing.assert_close(seen, narrow.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_a_context_switch_is_cheap(toys):
    """Thousands of fibres that switch often are what makes the tests of the kernels affordable."""
    began = time.perf_counter()
    assert rotated(toys, 0, in_warp=False, rounds=500)
    switches = 6 * 128 * 500 * 2
    assert (time.perf_counter() - began) / switches < 2e-6
