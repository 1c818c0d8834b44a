"""How times are taken: GPU time from CUDA-graph replays over rotated inputs, wall time per call without a graph.

The inputs of a timed call are cold in L2: calls rotate through enough input sets (`ROTATE_BYTES`) that a set is
evicted before its turn comes again, and each call writes to memory of its own. Times are medians in microseconds.
The floor is the time that the bytes or the FLOPs alone would take on the architecture's measured rates.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fusion_passes import arch

# More than twice the largest L2 in the table of architectures.
ROTATE_BYTES = 130 << 20

Call = Callable[..., Any]
MakeArgs = Callable[[torch.device, torch.Generator], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One benchmarked shape of an op.

    Attributes:
        name: the shape in words.
        op: what is timed; called with the arguments that `make` returns.
        make: draws fresh arguments on a device.
        bytes: each input read once plus each output written once.
        flops: floating-point operations.
        reference: the op in plain PyTorch, for the error; computes in float64 on float64 inputs.
    """

    name: str
    op: Call
    make: MakeArgs
    bytes: int
    flops: int
    reference: Call

    def floor_us(self, on: arch.Architecture) -> float:
        """The least time that memory (or the matrix units) allow, in microseconds."""
        return 1e6 * max(self.bytes / on.copy_rate, self.flops / on.matmul_rate)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one callable, in microseconds: the medians, and the fastest and slowest replay per call."""

    gpu_us: float
    gpu_min_us: float
    gpu_max_us: float
    wall_us: float


def input_sets(case: Case, device: torch.device, seed: int = 0) -> list[tuple[Any, ...]]:
    """Independent argument tuples, enough of them that their traffic exceeds L2 twice."""
    generator = torch.Generator(device=device).manual_seed(seed)
    count = min(64, max(2, math.ceil(ROTATE_BYTES / max(case.bytes, 1))))
    return [case.make(device, generator) for _ in range(count)]


def capture(call: Call, sets: Sequence[tuple[Any, ...]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call per input set, captured after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for args in sets[:3]:
            call(*args)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Outputs stay referenced until the capture ends, so that no call writes where an earlier one did.
        kept = [call(*args) for args in sets]
    del kept
    return graph


def measure(call: Call, sets: Sequence[tuple[Any, ...]], *, repeats: int = 15, budget_s: float = 0.25) -> Timing:
    """Time a callable on rotated inputs.

    Args:
        call: takes one of the argument tuples; must not synchronise with the host.
        sets: from `input_sets`.
        repeats: timed replays at least; more while `budget_s` seconds are not over, 200 at most.
    """
    graph = capture(call, sets)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(times) < repeats or (time.perf_counter() < deadline and len(times) < 200):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(sets))
    return Timing(statistics.median(times), min(times), max(times), wall_us(call, sets))


def wall_us(call: Call, sets: Sequence[tuple[Any, ...]], *, calls: int = 50, rounds: int = 5) -> float:
    """Wall time per call without a graph: launch overhead or GPU time, whichever is longer; median of rounds."""
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(calls):
            call(*sets[index % len(sets)])
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) / calls)
    return statistics.median(taken) * 1e6


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; infinity where one is NaN and the other is not."""
    actual, exact = actual.double(), exact.double()
    if not torch.equal(actual.isnan(), exact.isnan()):
        return math.inf
    return float((actual - exact).nan_to_num().norm() / exact.nan_to_num().norm().clamp_min(1e-300))


def exact_result(case: Case, args: tuple[Any, ...]) -> torch.Tensor:
    """The case's reference on float64 copies of the arguments."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return case.reference(*wide)


def environment() -> dict[str, str | int | float]:
    """What a result depends on: GPU, driver, versions and commit."""
    record: dict[str, str | int | float] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _output("git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"),
    }
    try:
        import triton

        record["triton"] = triton.__version__
    except ImportError:
        record["triton"] = "none"
    if torch.cuda.is_available():
        on = arch.of_device(torch.device("cuda"))
        record |= {"gpu": torch.cuda.get_device_name(), "arch": on.name, "multiprocessors": on.multiprocessors}
        record["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        record["assumed_copy_rate"] = on.copy_rate
    return record


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def copy_rate(size: int = 2 << 30) -> float:
    """Bytes read plus written per second by a large device-to-device copy."""
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    timing = measure(lambda a, b: b.copy_(a), [(source, target)] * 2)
    return 2 * size / timing.gpu_us * 1e6


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Results with the environment they were taken in."""
    path.write_text(json.dumps({"environment": environment(), "results": list(rows)}, indent=1) + "\n")
