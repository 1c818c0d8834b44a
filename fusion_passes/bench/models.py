"""Whole Hugging Face models at real width: eager, stock Inductor and ours, in one process with the same inputs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from fusion_passes import benchmarking, hf_models
from fusion_passes.bench.contestants import STOCK, ours
from fusion_passes.bench.results import Entry, Row
from fusion_passes.bench.verdicts import gate
from fusion_passes.demo import TOLERANCE
from fusion_passes.reports import report

BASELINES = (*STOCK, "eager")


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one call of a model costs: microseconds, launches, MiB."""

    gpu_us: float
    wall_us: float
    kernels: int
    peak_mb: int


Clock = Callable[[Callable[[], Any]], Sample]


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of a model and its input."""

    tokens: int = 2048
    batch: int = 1
    layers: int = 2

    def __str__(self) -> str:
        return f"T={self.tokens} B={self.batch} layers={self.layers}"


def on_gpu(call: Callable[[], Any]) -> Sample:
    """Costs of a call on the current GPU; it must be captured by a CUDA graph as it stands."""
    call()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() >> 20
    wall = statistics.median(_wall_us(call) for _ in range(30))
    graph = benchmarking.capture(lambda *unused: call(), [()])
    gpu = statistics.median(benchmarking.replay_us(graph) for _ in range(20))
    return Sample(gpu, wall, kernels_of(call), peak)


def kernels_of(call: Callable[[], Any]) -> int:
    """GPU kernels that one call launches, memory copies and fills not counted."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        call()
        torch.cuda.synchronize()
    on_gpu = (event for event in trace.events() if event.device_type == DeviceType.CUDA)
    # Annotated ranges are shown on the GPU's time line as well.
    names = [event.name for event in on_gpu if not getattr(event, "is_user_annotation", False)]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def _wall_us(call: Callable[[], Any]) -> float:
    benchmarking.synchronize()
    start = time.perf_counter()
    call()
    benchmarking.synchronize()
    return 1e6 * (time.perf_counter() - start)


def require() -> None:
    """Raise an ImportError that says what to install unless models can be built."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("models need transformers: pip install 'fusion-passes[demo]'")


@torch.no_grad()
def measure(
    name: str, size: Size, baselines: Sequence[str], device: torch.device, clock: Clock = on_gpu, **build: Any
) -> Row:
    """Times, kernels, memory, first call and fused sites of one model, ours first.

    Args:
        name: one of `hf_models.NAMES`.
        size: tokens, batch and layers.
        baselines: names of `BASELINES` to put beside us.
        device: where the model runs.
        clock: measures a call.
        build: further arguments of `hf_models.build`; real widths in bfloat16 unless given.

    Raises:
        ImportError, ValueError: the model cannot be built; see `hf_models.build`.
    """
    arguments = {"dtype": torch.bfloat16, "real": True, **build}
    model, inputs = hf_models.build(
        name, layers=size.layers, seq=size.tokens, batch=size.batch, device=device, **arguments
    )
    expected = model(**inputs).last_hidden_state.double()
    variants: dict[str, dict[str, Any]] = {"fused": ours(device)}
    variants |= {name: STOCK.get(name, {}) for name in baselines if name in BASELINES}
    entries = {}
    for variant, how in variants.items():
        entries[variant] = _tried(variant, model, inputs, expected, how, clock)
    # Stock rounds elsewhere than eager does: ours may be as far off as stock, twice, but not further.
    errors = [entries[name].error or 0.0 for name in STOCK if name in entries]
    bound = max([TOLERANCE[arguments["dtype"]], *(2 * error for error in errors)])
    entries = {name: gate(entry, bound) for name, entry in entries.items()}
    return Row(name, str(size), entries, bound=float(f"{bound:.1e}"), model=True)


def _tried(
    variant: str, model: torch.nn.Module, inputs: dict[str, Any], expected: torch.Tensor, how: dict[str, Any],
    clock: Clock,
) -> Entry:  # fmt: skip
    torch._dynamo.reset()
    before = report().counts
    run = model if variant == "eager" else torch.compile(model, fullgraph=True, **how)
    try:
        # Nothing may come from a cache: the first call counts the whole compilation.
        with fresh_cache():
            benchmarking.synchronize()
            start = time.perf_counter()
            out = run(**inputs).last_hidden_state.double()
            benchmarking.synchronize()
            first = time.perf_counter() - start
            sample = clock(functools.partial(run, **inputs))
    except Exception as problem:
        return Entry(failed=f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:200])
    error = benchmarking.relative_error(out, expected)
    counts = report().counts
    sites = {name: counts[name] - before[name] for name in counts if counts[name] > before[name]}
    return Entry(
        sample.gpu_us, sample.wall_us, error, sites if variant == "fused" else None,
        first_call_s=first, kernels=sample.kernels, peak_mb=sample.peak_mb,
    )  # fmt: skip
