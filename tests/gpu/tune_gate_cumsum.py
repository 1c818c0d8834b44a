"""Sweeps the launch parameters of `gate_cumsum`.

    PYTHONPATH=. python tests/gpu/tune_gate_cumsum.py --out tune.json

Prints the best five configurations of each case and the tuned choice, in microseconds of GPU time.
`python -m fusion_passes bench --op gate_cumsum` times stock code and peers beside it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch

from fusion_passes import arch, benchmarking, tuning
from fusion_passes.benchmarking import Case
from fusion_passes.ops.gate_cumsum import OP, cases

CHANNEL = [
    *(f"rows={r},lanes={n},warps={64 * n // (32 * held)},serial=1"
      for r, n, held in itertools.product((4, 8, 16), (32, 64, 128), (16, 32, 64))),
    "rows=64,lanes=32,warps=2,serial=0", "rows=64,lanes=64,warps=4,serial=0", "rows=32,lanes=64,warps=2,serial=0",
]  # fmt: skip
HEAD = [
    *(f"rows=64,lanes={n},warps={w},serial=0"
      for n, w in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (32, 4))),
    "rows=32,lanes=8,warps=1,serial=0", "rows=64,lanes=8,warps=1,serial=1", "rows=64,lanes=32,warps=1,serial=1",
]  # fmt: skip


def configurations(case: Case) -> list[str]:
    if case.name.startswith("KDA"):
        return CHANNEL
    heads = int(case.name.split("x")[0].split()[-1])
    return [c for c in HEAD if tuning.parse(c, "sweep")["lanes"] <= heads]


def warm(names: list[tuple[str, str]]) -> int:
    """Compile some (case, configuration) pairs into Triton's cache on disk; runs in a worker process."""
    by_name = {case.name: case for case in cases()}
    for name, forced in names:
        generator = torch.Generator("cuda").manual_seed(0)
        with tuning.overriding(gate_cumsum=forced):
            by_name[name].op(*by_name[name].make(torch.device("cuda"), generator))
    torch.cuda.synchronize()
    return len(names)


def compile_all(wanted: list[tuple[str, str]], workers: int) -> None:
    # One case per kernel is enough: the number of tokens does not enter a compiled kernel.
    distinct: dict[tuple[str, ...], tuple[str, str]] = {}
    for name, forced in wanted:
        kind, shape, _, layout = name.split()
        distinct.setdefault((kind, shape, layout, forced), (name, forced))
    pairs = list(distinct.values())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(warm, [pairs[i::workers] for i in range(workers)]))


def sweep(case: Case, budget_s: float) -> dict[str, Any]:
    sets = benchmarking.input_sets(case, torch.device("cuda"))
    exact = benchmarking.exact_result(case, sets[0])
    rows: list[dict[str, Any]] = []
    for forced in configurations(case):
        with tuning.overriding(gate_cumsum=forced):
            error = benchmarking.relative_error(OP(*sets[0]), exact)
            timing = benchmarking.measure(OP, sets, budget_s=budget_s)
        rows.append({"configuration": forced, "us": timing.gpu_us, "wall_us": timing.wall_us, "error": error})
    rows.sort(key=lambda row: row["us"])
    tuned = benchmarking.measure(OP, sets, budget_s=budget_s)
    floor = case.floor_us(arch.of_device(torch.device("cuda")))
    return {"case": case.name, "floor_us": floor, "sweep": rows, "tuned_us": tuned.gpu_us,
            "tuned_wall_us": tuned.wall_us}  # fmt: skip


def show(result: dict[str, Any]) -> None:
    print(f"{result['case']:28s} floor {result['floor_us']:6.1f}  tuned {result['tuned_us']:6.1f} us"
          f" (wall {result['tuned_wall_us']:.0f})")  # fmt: skip
    for row in result["sweep"][:5]:
        print(f"    {row['us']:7.2f}  {row['configuration']:38s} error {row['error']:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all results")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of replays per measurement, at least")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.only in case.name]
    start = time.perf_counter()
    compile_all([(case.name, forced) for case in chosen for forced in configurations(case)], options.workers)
    print(f"compiled in {time.perf_counter() - start:.0f} s; copy rate {benchmarking.copy_rate() / 1e12:.2f} TB/s")
    results: list[dict[str, Any]] = []
    for case in chosen:
        results.append(sweep(case, options.budget))
        show(results[-1])
        benchmarking.write_json(options.out, results)
    print(f"{len(results)} cases in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
