"""Measures one case: every contestant once for its error, then all of them in turns for their times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fusion_passes import arch, benchmarking
from fusion_passes.bench.contestants import contestants
from fusion_passes.bench.results import OURS, Entry, Row, first_line
from fusion_passes.bench.verdicts import gate
from fusion_passes.benchmarking import Call, Case, Timing
from fusion_passes.reports import Report, report

# What others round is not ours to bound: only results further off than this many times the bound have no times.
OTHERS_SLACK = 2.0

# Takes the callables and the input sets, and gives the times of each or the exception that kept it from them.
Clock = Callable[[Mapping[str, Call], Sequence[tuple[Any, ...]]], dict[str, Timing | Exception]]


def on_gpu(calls: Mapping[str, Call], sets: Sequence[tuple[Any, ...]]) -> dict[str, Timing | Exception]:
    """The clock of the command line: CUDA-graph replays and wall time."""
    return benchmarking.measure_together(calls, sets, budget_s=0.02)


@torch.no_grad()
def measure(
    op: str, case: Case, baselines: Sequence[str], on: arch.Architecture, device: torch.device, clock: Clock = on_gpu,
    warm: bool = False,
) -> Row:  # fmt: skip
    """Times and errors of all contestants on one case.

    Args:
        op: the name of the op that declares the case.
        case: the case.
        baselines: names of what is put beside us, see `contestants.known_baselines`.
        on: the architecture whose rates give the floor.
        device: where the arguments live.
        clock: takes the times.
        warm: replay one set of inputs in place of cold ones.

    Returns:
        A row. Contestants that are missing, raise, or are further from float64 than the case's bound (others than
        ours: `OTHERS_SLACK` times the bound) have `failed` and no times.
    """
    torch._dynamo.reset()
    calls, missing = contestants(case, baselines, device)
    sets = (benchmarking.warm_sets if warm else benchmarking.input_sets)(case, device)
    exact = benchmarking.exact_result(case, sets[0])
    eager_error, dtype = _scale(case, sets[0], exact)
    bound = case.error_bound(eager_error, dtype)
    entries = {name: _tried(name, call, case, sets[0], exact) for name, call in calls.items()}
    bounds = {name: bound * (1 if name in OURS else OTHERS_SLACK) for name in entries}
    entries = {name: gate(entry, bounds[name]) for name, entry in entries.items()}
    timed = clock({name: calls[name] for name, entry in entries.items() if not entry.failed}, sets)
    entries = {name: _with_times(entry, timed.get(name)) for name, entry in entries.items()}
    entries |= {name: Entry(failed=reason) for name, reason in missing.items()}
    floor = round(case.floor_us(on), 2)
    return Row(op, case.name, entries, case.bytes, case.flops, floor, float(f"{bound:.1e}"))


def _scale(case: Case, args: tuple[Any, ...], exact: Any) -> tuple[float, torch.dtype]:
    """The error of the eager spelling (0 where there is none), and the coarsest dtype of the op's results."""
    eager_error = benchmarking.relative_error(case.plain(*args), exact) if case.plain is not None else 0.0
    dtypes = [out.dtype for out in tree_leaves(case.op(*args)) if out.dtype.is_floating_point]
    return eager_error, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.int64)


def _tried(name: str, call: Call, case: Case, args: tuple[Any, ...], exact: Any) -> Entry:
    """The contestant's error, and for our compile what was fused."""
    before = report().records
    try:
        error = benchmarking.relative_error(call(*args), exact)
    except Exception as problem:
        return Entry(failed=first_line(problem))
    if name != OURS[0]:
        return Entry(error=error)
    records = report().records
    new = (record for record in dict.fromkeys(records) if records.count(record) > before.count(record))
    found = Report(tuple(new))
    sites = {case.fusion_name: 0} | found.counts
    note = "" if sites[case.fusion_name] else _why_not(found)
    return Entry(error=error, sites=sites, note=note)


def _why_not(found: Report) -> str:
    reasons = [record.reason for record in (*found.refusals, *found.near_misses)]
    return f"left alone: {reasons[0] if reasons else 'no candidate was found'}"


def _with_times(entry: Entry, timing: Timing | Exception | None) -> Entry:
    if timing is None:
        return entry
    if isinstance(timing, Exception):
        return Entry(error=entry.error, failed=first_line(timing))
    return Entry(timing.gpu_us, timing.wall_us, entry.error, entry.sites, note=entry.note)
