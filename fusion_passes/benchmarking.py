"""How times are taken: GPU time from CUDA-graph replays over rotated inputs, wall time per call without a graph.

The inputs of a timed call are cold in L2: calls rotate through enough input sets (`ROTATE_BYTES`) that a set is
evicted before its turn comes again, and each call writes to memory of its own. With `warm_sets` one set is replayed,
and what fits in L2 stays there, as between the layers of a model. Callables that are compared take turns, so that a
clock that drifts drifts for all. A turn is one replay that is not timed, so that what has to be written back from L2 is
a callable's own, and one that is, of `CALLS` calls or `REPLAY_US`, so that the start of a graph does not count; then
the GPU rests for as long as that took. Without rest a GPU at its power limit lowers its clock, and what keeps the
matrix units busy takes a tenth longer. Times are medians in microseconds. The floor is the time that the bytes or the
FLOPs alone would take on the architecture's measured rates.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fusion_passes import arch

# More than twice the largest L2 in the table of architectures.
ROTATE_BYTES = 130 << 20

# Calls in one replay, fewer if they take this many microseconds all the same.
CALLS = 16
REPLAY_US = 2000.0

# Cases up to this many bytes are "small": a round of them takes seconds and not minutes.
SMALL_BYTES = 32 << 20

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
        reference: the op in plain PyTorch, for the error; computes in float64 on float64 inputs. One tensor, or a
            sequence of them.
        plain: the spelling of a model: takes the same arguments, is compiled as stock and as ours, and must then give
            the fused op. Its results have the elements of the reference in the same order, in any shape.
        peers: other implementations by name. The value imports what it needs and returns the callable; an ImportError
            says that the package is not there.
        fusion: the fusion that must find `plain`; the name of the op unless given.
        bound: largest relative error (L2) against the reference that counts as right; None for the rule of
            `error_bound`.
    """

    name: str
    op: Call
    make: MakeArgs
    bytes: int
    flops: int
    reference: Call
    plain: Call | None = None
    peers: Mapping[str, Callable[[], Call]] = dataclasses.field(default_factory=dict)
    fusion: str = ""
    bound: float | None = None

    @property
    def fusion_name(self) -> str:
        """The fusion that is expected to find `plain`."""
        return self.fusion or str(self.op).removesuffix(".default").rpartition(".")[2]

    @property
    def small(self) -> bool:
        return self.bytes <= SMALL_BYTES

    def error_bound(self, eager_error: float, dtype: torch.dtype) -> float:
        """The error that is allowed: twice that of the eager spelling plus one rounding of the result's dtype."""
        if self.bound is not None:
            return self.bound
        return 2 * (eager_error + (torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0))

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
    return [case.make(device, generator) for _ in range(_set_count(case))]


def warm_sets(case: Case, device: torch.device, seed: int = 0) -> list[tuple[Any, ...]]:
    """One argument tuple, as many times as `input_sets` has different ones."""
    return [case.make(device, torch.Generator(device=device).manual_seed(seed))] * _set_count(case)


def _set_count(case: Case) -> int:
    return min(64, max(2, math.ceil(ROTATE_BYTES / max(case.bytes, 1))))


def capture(call: Call, sets: Sequence[tuple[Any, ...]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call per entry of `sets`, captured after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for args in sets[:3]:
            call(*args)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            # Outputs stay referenced until the capture ends, so that no call writes where one on another set did.
            kept: dict[int, Any] = {}
            for args in sets:
                kept.pop(id(args), None)
                kept[id(args)] = call(*args)
    except Exception:
        # A capture that failed leaves the state of the random numbers marked as captured: every later draw would fail.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    del kept
    return graph


def measure(call: Call, sets: Sequence[tuple[Any, ...]], *, repeats: int = 15, budget_s: float = 0.25) -> Timing:
    """Time a callable on rotated inputs.

    Args:
        call: takes one of the argument tuples; must not synchronise with the host.
        sets: from `input_sets`.
        repeats: timed replays at least; more while `budget_s` seconds are not over, 200 at most.
    """
    timing = measure_together({"": call}, sets, repeats=repeats, budget_s=budget_s)[""]
    if isinstance(timing, Exception):
        raise timing
    return timing


def measure_together(
    calls: Mapping[str, Call], sets: Sequence[tuple[Any, ...]], *, repeats: int = 15, budget_s: float = 0.25
) -> dict[str, Timing | Exception]:
    """Time several callables in turns; an exception in place of the times of one that cannot be captured.

    Arguments as for `measure`; the budget is for each of the callables.
    """
    found: dict[str, Timing | Exception] = {}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, call in calls.items():
        try:
            graphs[name] = _long_enough(call, sets)
        except Exception as error:
            found[name] = error
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in _rounds(repeats, budget_s * len(graphs), most=200):
        for name, (graph, count) in graphs.items():
            graph.replay()  # a callable starts behind its own writes to the L2, and not behind another's
            taken = replay_us(graph)
            times[name].append(taken / count)
            time.sleep(2e-6 * taken)
    walls = wall_us_together({name: calls[name] for name in graphs}, sets)
    for name, each in times.items():
        found[name] = Timing(statistics.median(each), min(each), max(each), walls[name])
    return found


def _rounds(least: int, budget_s: float, most: float = math.inf) -> Iterator[int]:
    """So many rounds at least, and more, up to `most`, while the seconds are not over."""
    deadline = time.perf_counter() + budget_s
    for done in itertools.count():
        if done >= least and (done >= most or time.perf_counter() >= deadline):
            return
        yield done


def _long_enough(call: Call, sets: Sequence[tuple[Any, ...]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of `CALLS` calls, or of `REPLAY_US`, on whole rounds through the sets; and its number of calls."""
    graph = capture(call, sets)
    once = min(replay_us(graph) for _ in range(3))
    rounds = max(1, math.ceil(min(CALLS / len(sets), REPLAY_US / once)))
    return (graph if rounds == 1 else capture(call, [*sets] * rounds)), rounds * len(sets)


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """GPU time of one replay, waited for, in microseconds."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def wall_us_together(
    functions: Mapping[str, Call], sets: Sequence[tuple[Any, ...]], *, calls: int = 50, rounds: int = 5,
    budget_s: float = 0.25,
) -> dict[str, float]:  # fmt: skip
    """Wall time per call without a graph: launch overhead or GPU time, whichever is longer; medians of rounds in turns.

    There are more rounds than `rounds` while `budget_s` seconds for each callable are not over: other work on the host
    comes in bursts that outlast a few short ones.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in _rounds(rounds, budget_s * len(functions)):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            for index in range(calls):
                function(*sets[index % len(sets)])
            synchronize()
            taken[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) * 1e6 for name, values in taken.items()}


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def relative_error(actual: Any, exact: Any) -> float:
    """||actual - exact|| / ||exact|| in float64; infinity where one is NaN and the other is not.

    Of several results the largest error. Shapes may differ as long as the elements are in the same order.

    Raises:
        ValueError: another number of results or of elements.
    """
    pairs = list(zip(tree_leaves(actual), tree_leaves(exact)))
    if len(tree_leaves(actual)) != len(tree_leaves(exact)):
        raise ValueError(f"there are {len(tree_leaves(actual))} results and {len(tree_leaves(exact))} in the reference")
    return max(_error(a, b) for a, b in pairs)


def _error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    if actual.numel() != exact.numel():
        raise ValueError(f"a result has shape {list(actual.shape)} and the reference {list(exact.shape)}")
    actual, exact = actual.double().reshape(exact.shape), exact.double()
    if not torch.equal(actual.isnan(), exact.isnan()):
        return math.inf
    # Equal infinities subtract to NaN and count as equal; one that is missing makes the error infinite.
    difference = torch.where((actual == exact) | exact.isnan(), 0.0, actual - exact)
    return float(difference.norm() / exact.nan_to_num(0.0, 0.0, 0.0).norm().clamp_min(1e-300))


def exact_result(case: Case, args: tuple[Any, ...]) -> Any:
    """The case's reference on float64 copies of the arguments."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return case.reference(*wide)


def environment() -> dict[str, str | int | float]:
    """What a result depends on: GPU, driver, versions and commit."""
    record: dict[str, str | int | float] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "commit": commit(),
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
        record |= {"assumed_copy_rate": on.copy_rate, "assumed_matmul_rate": on.matmul_rate}
    return record


def commit() -> str:
    """FUSION_PASSES_COMMIT, else the commit of the checkout that this file belongs to, else "unknown"."""
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    if os.environ.get("FUSION_PASSES_COMMIT"):
        return os.environ["FUSION_PASSES_COMMIT"]
    # An installed copy may lie inside some other project's checkout.
    if _output(*git, "ls-files", here.name) != here.name:
        return "unknown"
    return _output(*git, "describe", "--always", "--dirty")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def copy_rate(size: int = 2 << 30) -> float:
    """Bytes read plus written per second by a large pointwise kernel."""
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    timing = measure(lambda a, b: torch.neg(a, out=b), [(source, target)] * 2)
    return 2 * size / timing.gpu_us * 1e6


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Results with the environment they were taken in."""
    path.write_text(json.dumps({"environment": environment(), "results": list(rows)}, indent=1) + "\n")
