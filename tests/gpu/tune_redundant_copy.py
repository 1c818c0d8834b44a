"""Times every row of the table of copies: eager, stock torch.compile, and ours.

    PYTHONPATH=. python tests/gpu/tune_redundant_copy.py --out copies.json

Processes compile all rows into one cache first, and say what the code launches and moves; then one process, which
finds the code in that cache, times row after row.

Microseconds of GPU time per call (cold inputs). Bytes are those of the kernels, calls into libraries left out, counted
as the tests of the generated code count them; "ideal" is what is left to do. A time is followed by WRONG where results
or inputs are not those of eager. Whoever edits the limits of the profit rule (`LAUNCH_BYTES`, `ROTATION_BYTES`) or the
launch of the rotation (`PAIRS`, `FEW_ROWS`) reads the numbers off here; `--pairs` tries other numbers of pairs per
program, `--combo` adds Inductor's combo kernels.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fusion_passes
from fusion_passes import benchmarking
from fusion_passes.ops import rotate_pairs
from tests.support.redundant_copy import Code, measured
from tests.support.redundant_copy_rows import ROWS, Dims, make

# With a single token launches are what counts, for the rows whose number of launches depends on the fusion.
TOKENS = (2048, 1)
AT_ONE_TOKEN = ("R", "K")
# Of results in bfloat16, which eager rounds more often.
TOLERANCE = 1e-2

# Options of `torch.compile` by name.
VARIANTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "combo": {"combo_kernels": True},
    "fused": fusion_passes.options(fusions="redundant_copy", always_profitable=True),
}


def cases(only: str) -> list[tuple[str, int]]:
    """The rows and numbers of tokens that are timed."""
    found = [(name, tokens) for tokens in TOKENS for name in ROWS if tokens > 1 or name.startswith(AT_ONE_TOKEN)]
    return [(name, tokens) for name, tokens in found if only in name]


def compiled(name: str, variant: str) -> Callable[..., Any]:
    # Each variant is compiled on its own: Dynamo would otherwise take one for a recompile of another.
    function = ROWS[name].function
    options = VARIANTS[variant] or None
    return torch.compile(lambda *args: function(*args), fullgraph=True, dynamic=False, options=options)


def compile_row(name: str, tokens: int, variant: str, device: str = "cuda") -> dict[str, int]:
    """Compile into the cache: what the code launches and moves, as far as Inductor has generated it."""
    from torch._inductor.graph import GraphLowering

    found: list[Code] = []
    codegen = GraphLowering.codegen

    def capture(self: GraphLowering) -> Any:
        code = codegen(self)
        text: Any = code[0]
        found.append(measured(self, getattr(text, "value", text), 0))
        return code

    torch.set_num_threads(1)
    torch._dynamo.reset()
    args = make(ROWS[name].inputs, Dims(tokens=tokens), device=device)
    with torch.no_grad(), mock.patch.object(GraphLowering, "codegen", capture):
        compiled(name, variant)(*args)
    own = ROWS[name].own(Dims(tokens=tokens)) if variant == "fused" else 0
    return {"launches": sum(len(code.launches) for code in found), "bytes": own + sum(code.bytes for code in found)}


def compile_all(wanted: Sequence[tuple[str, int]], variants: Sequence[str], jobs: int) -> dict[Any, dict[str, int]]:
    """`compile_row` for all rows in several processes; a failure is named and leaves its row out."""
    found = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        work = {pool.submit(compile_row, *case, variant): (*case, variant) for case in wanted for variant in variants}
        for done in concurrent.futures.as_completed(work):
            try:
                found[work[done]] = done.result()
            except Exception as error:
                print(f"{work[done]}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return found


def input_sets(row_inputs: str, dims: Dims) -> list[tuple[Tensor, ...]]:
    first = tuple(make(row_inputs, dims, device="cuda"))
    size = sum(t.numel() * t.element_size() for t in first)
    count = min(32, max(2, math.ceil(benchmarking.ROTATE_BYTES / size)))
    return [first, *(tuple(make(row_inputs, dims, device="cuda")) for _ in range(count - 1))]


def results_of(call: Callable[..., Any], args: Sequence[Tensor]) -> list[Tensor]:
    """What a call returns and leaves in its inputs, which are copied first."""
    ours = [a.clone() for a in args]
    result = call(*ours)
    return [t for t in (*torch.utils._pytree.tree_leaves(result), *ours) if isinstance(t, Tensor)]


def measure(name: str, tokens: int, code: Mapping[str, dict[str, int]], budget_s: float) -> dict[str, Any]:
    row, dims = ROWS[name], Dims(tokens=tokens)
    sets = input_sets(row.inputs, dims)
    calls = {"eager": row.function, **{variant: compiled(name, variant) for variant in code}}
    before = fusion_passes.report().counts["redundant_copy"]
    values = {variant: results_of(call, sets[0]) for variant, call in calls.items()}
    sites = fusion_passes.report().counts["redundant_copy"] - before
    found: dict[str, dict[str, Any]] = {}
    for variant, timing in benchmarking.measure_together(calls, sets, budget_s=budget_s).items():
        pairs = zip(values[variant], values["eager"], strict=True)
        error = max((benchmarking.relative_error(a, b) for a, b in pairs), default=0.0)
        found[variant] = {"error": float(f"{error:.1e}"), **code.get(variant, {})}
        if isinstance(timing, Exception):
            found[variant]["failed"] = f"{type(timing).__name__}: {timing}"[:200]
        else:
            found[variant] |= {"us": round(timing.gpu_us, 2), "wall_us": round(timing.wall_us, 1)}
    ideal = row.moved(dims) + row.own(dims)
    return {"row": name, "tokens": tokens, "sites": sites, "ideal_bytes": ideal, "variants": found}


def show(result: dict[str, Any]) -> None:
    cells = []
    for variant, seen in result["variants"].items():
        us = f"{seen['us']:8.2f}" if "us" in seen else "  failed"
        wrong = " WRONG" if seen["error"] > TOLERANCE else ""
        work = f" ({seen['launches']} k {seen['bytes'] / 1e6:6.1f} MB)" if "bytes" in seen else ""
        cells.append(f"{variant}{us}{work}{wrong}")
    ideal = f"ideal {result['ideal_bytes'] / 1e6:5.1f} MB, {result['sites']} sites"
    print(f"{result['row']:24s} T={result['tokens']:<5d} " + "  ".join([*cells, ideal]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all results")
    parser.add_argument("--only", default="", help="part of the names of the rows to time")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of replays per measurement, at least")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which no further row is begun")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--combo", action="store_true", help="time combo kernels as well")
    parser.add_argument("--pairs", type=int, default=rotate_pairs.PAIRS, help="pairs per program of many rows")
    parser.add_argument("--few-rows", type=int, default=rotate_pairs.FEW_ROWS, help="rows up to which there are fewer")
    options = parser.parse_args()
    tuned = (options.pairs, options.few_rows) == (rotate_pairs.PAIRS, rotate_pairs.FEW_ROWS)
    rotate_pairs.PAIRS, rotate_pairs.FEW_ROWS = options.pairs, options.few_rows
    variants = [name for name in VARIANTS if options.combo or name != "combo"]
    start, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        wanted = cases(options.only)
        codes = compile_all(wanted, variants, options.jobs)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
        # The processes know nothing of other numbers of pairs.
        torch._inductor.config.force_disable_caches = not tuned
        for name, tokens in wanted:
            if time.perf_counter() - start > options.limit:
                print(f"{name} T={tokens}: not timed, the limit of {options.limit:.0f} s is over")
                continue
            torch._dynamo.reset()
            code = {v: codes[name, tokens, v] for v in variants if (name, tokens, v) in codes}
            with torch.no_grad():
                results.append(measure(name, tokens, code, options.budget))
            show(results[-1])
            benchmarking.write_json(options.out, results)
    print(f"all in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
