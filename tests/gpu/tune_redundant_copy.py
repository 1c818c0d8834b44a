"""Times every row of the table of copies: eager, stock torch.compile, combo kernels, and ours.

    PYTHONPATH=. python tests/gpu/tune_redundant_copy.py --out copies.json

Microseconds of GPU time per call (cold inputs), with the launches of the compiled code and the bytes that Inductor
counts for it, the calls into libraries included. A time is followed by WRONG where results or inputs are not those of
eager. Whoever edits the limits of the profit rule (`LAUNCH_BYTES`, `ROTATION_BYTES`) or the launch of the rotation
(`PAIRS`, `FEW_ROWS`) reads the numbers off here; `--pairs` tries other numbers of pairs per program.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusion_passes
from fusion_passes import benchmarking
from fusion_passes.ops import rotate_pairs
from tests.support.redundant_copy_rows import ROWS, Dims, make

# With a single token launches are what counts, for the rows whose number of launches depends on the fusion.
TOKENS = (2048, 1)
AT_ONE_TOKEN = ("R", "K")
# Of results in bfloat16, which eager rounds more often.
TOLERANCE = 1e-2


def input_sets(row_inputs: str, dims: Dims) -> list[tuple[Tensor, ...]]:
    first = tuple(make(row_inputs, dims, device="cuda"))
    size = sum(t.numel() * t.element_size() for t in first)
    count = min(32, max(2, math.ceil(benchmarking.ROTATE_BYTES / size)))
    return [first, *(tuple(make(row_inputs, dims, device="cuda")) for _ in range(count - 1))]


def compile_as(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    # Each variant is compiled on its own: Dynamo would otherwise take one for a recompile of another.
    return torch.compile(lambda *args: function(*args), fullgraph=True, dynamic=False, options=options or None)


def variants(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    ours = fusion_passes.options(fusions="redundant_copy", always_profitable=True)
    return {
        "eager": function,
        "stock": compile_as(function),
        "combo": compile_as(function, combo_kernels=True),
        "ours": compile_as(function, **ours),
    }


def tensors(result: Any, args: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in (*torch.utils._pytree.tree_leaves(result), *args) if isinstance(t, Tensor)]


def first_call(call: Callable[..., Any], args: Sequence[Tensor]) -> dict[str, Any]:
    """Compile: launches, bytes, and the error of results and inputs against eager's."""
    from torch._inductor import metrics
    from torch._inductor.utils import run_and_get_code

    ours, before = [a.clone() for a in args], metrics.num_bytes_accessed
    result, codes = run_and_get_code(call, *ours)
    launches = sum(code[code.index("def call(") :].count(".run(") for code in codes)
    return {"values": tensors(result, ours), "launches": launches, "bytes": metrics.num_bytes_accessed - before}


def count_bytes() -> None:
    """Have Inductor count the bytes of what it compiles, which newer versions do for their log alone."""
    from torch._inductor import compile_fx

    log = getattr(compile_fx, "inductor_metrics_log", None)
    if log is not None:
        log.setLevel(logging.INFO)
        log.propagate = False


def measure(name: str, tokens: int, budget_s: float) -> dict[str, Any]:
    row, before = ROWS[name], saved_bytes()
    sets = input_sets(row.inputs, Dims(tokens=tokens))
    calls = variants(row.function)
    found: dict[str, dict[str, Any]] = {}
    for variant, call in calls.items():
        found[variant] = first_call(call, sets[0])
    wanted = found["eager"]["values"]
    for seen in found.values():
        values = seen.pop("values")
        seen["error"] = max((benchmarking.relative_error(a, b) for a, b in zip(values, wanted, strict=True)), default=0)
    timings = benchmarking.measure_together(calls, sets, budget_s=budget_s)
    for variant, timing in timings.items():
        if isinstance(timing, Exception):
            found[variant]["failed"] = f"{type(timing).__name__}: {timing}"[:200]
        else:
            found[variant] |= {"us": timing.gpu_us, "wall_us": timing.wall_us}
    return {"row": name, "tokens": tokens, "saved_bytes": saved_bytes() - before, "variants": found}


def saved_bytes() -> int:
    """Bytes that the sites fused so far save, as the report estimates them."""
    fused = (r for r in fusion_passes.report().fused if r.fusion == "redundant_copy")
    return sum(record.saved_bytes or 0 for record in fused)


def show(result: dict[str, Any]) -> None:
    cells = []
    for variant, seen in result["variants"].items():
        us = f"{seen['us']:8.2f}" if "us" in seen else "  failed"
        wrong = " WRONG" if seen["error"] > TOLERANCE else ""
        work = "" if variant == "eager" else f" ({seen['launches']} k {seen['bytes'] / 1e6:6.1f} MB)"
        cells.append(f"{variant}{us}{work}{wrong}")
    saved = f"saves {result['saved_bytes'] / 1e6:6.1f} MB"
    print(f"{result['row']:24s} T={result['tokens']:<5d} " + "  ".join([*cells, saved]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all results")
    parser.add_argument("--only", default="", help="part of the names of the rows to time")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of replays per measurement, at least")
    parser.add_argument("--limit", type=float, default=50.0, help="seconds after which no further row is begun")
    parser.add_argument("--pairs", type=int, default=rotate_pairs.PAIRS, help="pairs per program of many rows")
    parser.add_argument("--few-rows", type=int, default=rotate_pairs.FEW_ROWS, help="rows up to which there are fewer")
    options = parser.parse_args()
    rotate_pairs.PAIRS, rotate_pairs.FEW_ROWS = options.pairs, options.few_rows
    torch._inductor.config.force_disable_caches = True
    count_bytes()
    results, start = [], time.perf_counter()
    cases = [(name, tokens) for tokens in TOKENS for name in ROWS if tokens > 1 or name.startswith(AT_ONE_TOKEN)]
    for name, tokens in cases:
        if options.only not in name:
            continue
        if time.perf_counter() - start > options.limit:
            print(f"{name} T={tokens}: not timed, the limit of {options.limit:.0f} s is over")
            continue
        torch._dynamo.reset()
        with torch.no_grad():
            results.append(measure(name, tokens, options.budget))
        show(results[-1])
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
