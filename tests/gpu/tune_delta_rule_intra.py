"""Sweeps the launch parameters of `delta_rule_intra`, with flash-linear-attention and stock Inductor beside it.

    PYTHONPATH=. python tests/gpu/tune_delta_rule_intra.py --out tune.json

Prints for each case the configurations in microseconds of GPU time (cold inputs, outputs of their own) with their error
against float64, the tuned choice, and the peers. Whoever edits the table (`ops/tuned/delta_rule_intra.json`) reads the
numbers off here. Stock Inductor is one peer on demand: its spelling takes up to a minute to compile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusion_passes import arch, benchmarking, tuning
from fusion_passes.benchmarking import Case
from fusion_passes.ops._delta_rule_intra_cases import plain
from fusion_passes.ops.delta_rule_intra import cases
from tests.gpu.sweeps import attempt, stock_peers

CONFIGURATIONS = [
    f"warps={warps},key_block={key},value_block={value}"
    for warps, (key, value) in itertools.product((4, 8), ((64, 64), (128, 64), (64, 128)))
]
DEFAULT = ["KDA 32/32x128 T=4096", "KDA 32/32x128 T=512", "GDN 16/32x128 T=4096", "GDN 16/32x128 T=512"]


def peers(case: Case, names: list[str]) -> dict[str, Callable[[], Callable[..., Any]]]:
    known: dict[str, Callable[[], Callable[..., Any]]] = {**case.peers}
    if case.plain is not None:
        known |= stock_peers(plain)
    return {name: known[name] for name in names if name in known}


def timed(make: Callable[[], Callable[..., Any]], sets: list[Any], exact: Any, budget_s: float) -> dict[str, Any]:
    def figures() -> dict[str, Any]:
        call = make()
        error = benchmarking.relative_error(call(*sets[0]), exact)
        timing = benchmarking.measure(call, sets, budget_s=budget_s)
        return {"us": timing.gpu_us, "wall_us": timing.wall_us, "error": error}

    return attempt(figures)


def sweep(case: Case, budget_s: float, names: list[str]) -> dict[str, Any]:
    """All configurations and peers of one case."""
    sets = benchmarking.input_sets(case, torch.device("cuda"))
    exact = benchmarking.exact_result(case, sets[0])
    rows = []
    for forced in CONFIGURATIONS:
        with tuning.overriding(delta_rule_intra=forced):
            rows.append({"configuration": forced, **timed(lambda: case.op, sets, exact, budget_s)})
    rows.sort(key=lambda row: row["us"])
    floor = case.floor_us(arch.of_device(torch.device("cuda")))
    result: dict[str, Any] = {"case": case.name, "floor_us": floor, "sweep": rows, "peers": {}}
    result["tuned"] = timed(lambda: case.op, sets, exact, budget_s)
    for name, make in peers(case, names).items():
        torch._dynamo.reset()
        result["peers"][name] = timed(make, sets, exact, budget_s)
    return result


def _text(row: dict[str, Any]) -> str:
    return row.get("failed") or f"{row['us']:8.2f} us, wall {row['wall_us']:.0f}, error {row['error']:.1e}"


def show(result: dict[str, Any]) -> None:
    print(f"{result['case']:36s} floor {result['floor_us']:6.1f}  tuned {_text(result['tuned'])}")
    for row in result["sweep"]:
        print(f"    {row['configuration']:38s} {_text(row)}")
    for name, row in result["peers"].items():
        print(f"    {name:38s} {_text(row)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all results")
    parser.add_argument("--cases", default=";".join(DEFAULT), help="names of cases, separated by ;, or 'all'")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of replays per measurement, at least")
    parser.add_argument("--peers", default="fla", help="peers to time, such as fla,stock,combo")
    options = parser.parse_args()
    begin, results = time.perf_counter(), []
    wanted = options.cases.split(";")
    for case in cases():
        if options.cases == "all" or case.name in wanted:
            with torch.no_grad():
                results.append(sweep(case, options.budget, [name for name in options.peers.split(",") if name]))
            show(results[-1])
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{len(results)} cases in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
