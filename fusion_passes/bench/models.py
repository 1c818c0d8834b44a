"""Whole Hugging Face models at real width: eager, stock Inductor and ours, in one process with the same inputs.

Ours are two: "fused" is the model compiled as it is, "bound" the same inside of `fusion_passes.transformers.bind`, for
models with linear attention. What is timed is a forward of the whole input, or the step of decoding behind it.
"""

from __future__ import annotations

import contextlib
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
from fusion_passes.bench.contestants import BASELINES, STOCK, ours
from fusion_passes.bench.limits import time_limit
from fusion_passes.bench.results import COMPILED, Entry, Row, first_line
from fusion_passes.bench.verdicts import gate
from fusion_passes.demo import TOLERANCE
from fusion_passes.reports import report
from fusion_passes.transformers import bind

# Steps of decoding for which a cache has room behind the prompt; a sample takes fewer than this.
STEPS = 128


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one call of a model costs: microseconds, launches, MiB; a note on what could not be measured."""

    gpu_us: float | None
    wall_us: float
    kernels: int
    peak_mb: int
    note: str = ""


Clock = Callable[[Callable[[], Any]], Sample]


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of a model and its input; `decode` is the step of one more token behind it, with a static cache."""

    tokens: int = 2048
    batch: int = 1
    layers: int = 2
    decode: bool = False

    def __str__(self) -> str:
        return f"{'decode ' if self.decode else ''}T={self.tokens} B={self.batch} layers={self.layers}"


def on_gpu(call: Callable[[], Any]) -> Sample:
    """Costs of a call on the current GPU. Without a GPU time where a CUDA graph cannot capture it."""
    call()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() >> 20
    wall = statistics.median(_wall_us(call) for _ in range(30))
    kernels = kernels_of(call)
    try:
        graph = benchmarking.capture(lambda *unused: call(), [()])
    except RuntimeError as problem:
        return Sample(None, wall, kernels, peak, f"no CUDA graph: {first_line(problem)}")
    gpu = statistics.median(benchmarking.replay_us(graph) for _ in range(20))
    return Sample(gpu, wall, kernels, peak)


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
    name: str, size: Size, baselines: Sequence[str], device: torch.device, clock: Clock = on_gpu,
    ways: Sequence[str] = COMPILED[:1], limit_s: float | None = None, **build: Any,
) -> Row:  # fmt: skip
    """Times, kernels, memory, first call and fused sites of one model, ours first.

    Args:
        name: one of `hf_models.NAMES`.
        size: tokens, batch and layers.
        baselines: names of `BASELINES` to put beside us.
        device: where the model runs.
        clock: measures a call.
        ways: of `COMPILED`, how the model is made ours; without linear attention there is nothing to bind.
        limit_s: seconds that each contestant may take, compilation included.
        build: further arguments of `hf_models.build`; real widths in bfloat16 unless given.

    Raises:
        ImportError, ValueError: the model cannot be built; see `hf_models.build`.
    """
    arguments = {"dtype": torch.bfloat16, "real": True, **build}
    model, inputs = hf_models.build(
        name, layers=size.layers, seq=size.tokens, batch=size.batch, device=device, **arguments
    )
    prepare = functools.partial(hf_models.decoding, model, inputs, STEPS) if size.decode else lambda: inputs
    # On the CPU, where it takes no part in the peak of memory.
    expected = model(**prepare()).last_hidden_state.cpu()
    _start_compiler(name, device)
    variants = {way: ours(device) for way in ways if way != "bound" or name in hf_models.LINEAR_ATTENTION}
    variants |= {baseline: STOCK.get(baseline, {}) for baseline in baselines if baseline in BASELINES}
    entries = {}
    for variant, how in variants.items():
        try:
            with time_limit(limit_s):
                entries[variant] = _tried(variant, model, prepare, expected, how, clock)
        except TimeoutError as problem:
            entries[variant] = Entry(failed=str(problem))
    # Stock rounds elsewhere than eager does: ours may be as far off as stock, twice, but not further.
    errors = [entries[name].error or 0.0 for name in STOCK if name in entries]
    bound = max([TOLERANCE[arguments["dtype"]], *(2 * error for error in errors)])
    entries = {name: gate(entry, bound) for name, entry in entries.items()}
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) >> 20
    return Row(name, str(size), entries, bound=float(f"{bound:.1e}"), model=True, weights_mb=weights)


@functools.cache
def _start_compiler(name: str, device: torch.device) -> None:
    """Imports, worker processes and the first trace of a model's code would count as the first contestant's."""
    if device.type == "cuda":
        model, inputs = hf_models.build(name, dtype=torch.float32, seq=65, device=device)
        with fresh_cache():
            torch.compile(lambda x: -x)(torch.ones(8, device=device))
            torch.compile(model, backend="aot_eager")(**inputs)


def _tried(
    variant: str, model: torch.nn.Module, prepare: Callable[[], dict[str, Any]], expected: torch.Tensor,
    how: dict[str, Any], clock: Clock,
) -> Entry:  # fmt: skip
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        # 32 MiB for each stream on which another contestant was captured would count as this one's.
        torch._C._cuda_clearCublasWorkspaces()
    before = report().counts
    run = model if variant == "eager" else torch.compile(model, fullgraph=True, **how)
    notes = []
    try:
        inputs = prepare()
        # Nothing may come from a cache: the first call counts the whole compilation.
        with fresh_cache(), bind(model) if variant == "bound" else contextlib.nullcontext() as binding:
            benchmarking.synchronize()
            start = time.perf_counter()
            out = run(**inputs).last_hidden_state
            benchmarking.synchronize()
            first = time.perf_counter() - start
            error = benchmarking.relative_error(out.cpu(), expected)
            del out
            sample = clock(functools.partial(run, **inputs))
            notes += [reason for _, reason in binding.fallbacks] if binding is not None else []
    except Exception as problem:
        return Entry(failed=first_line(problem))
    counts = report().counts
    sites = {name: counts[name] - before[name] for name in counts if counts[name] > before[name]}
    return Entry(
        sample.gpu_us, sample.wall_us, error, sites if variant in COMPILED else None,
        note="; ".join(filter(None, (*notes, sample.note))),
        first_call_s=first, kernels=sample.kernels, peak_mb=sample.peak_mb,
    )  # fmt: skip
