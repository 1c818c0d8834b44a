"""Times `topk_mask` with every number of warps that can hold a row, cold inputs, microseconds of GPU time.

    PYTHONPATH=. python tests/gpu/tune_topk_mask.py --out tune.json

Whoever edits the table (`ops/tuned/topk_mask.json`) reads the numbers off here. Each is checked against the reference.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch

from fusion_passes import benchmarking, tuning
from fusion_passes.benchmarking import Case
from fusion_passes.ops.topk_mask import OP, cases
from tests.gpu.sweeps import attempt

WARPS = (2, 4, 8, 16, 32)


def timed(sets: list[tuple[Any, ...]], exact: torch.Tensor, budget_s: float) -> dict[str, Any]:
    """The time of the op; wrong results are a failure."""
    if not torch.equal(OP(*sets[0]), exact):
        raise AssertionError("another set than that of the reference")
    return {"us": benchmarking.measure(OP, sets, budget_s=budget_s).gpu_us}


def sweep(case: Case, budget_s: float) -> dict[str, Any]:
    """The chosen number of warps and all others on one case."""
    sets = benchmarking.input_sets(case, torch.device("cuda"))
    measure = functools.partial(timed, sets, case.reference(*sets[0]), budget_s)
    found: dict[str, Any] = {"case": case.name, "tuned": attempt(measure)}
    for warps in WARPS:
        with tuning.overriding(topk_mask=f"warps={warps}"):
            found[f"{warps} warps"] = attempt(measure)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all results")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--budget", type=float, default=0.1, help="seconds of replays per measurement")
    options = parser.parse_args()
    results = []
    for case in cases():
        if options.only in case.name:
            results.append(sweep(case, options.budget))
            times = (f"{name} {row['us']:.1f}" for name, row in results[-1].items() if name != "case")
            print(f"{case.name:42s} {', '.join(times)}", flush=True)
            benchmarking.write_json(options.out, results)


if __name__ == "__main__":
    main()
