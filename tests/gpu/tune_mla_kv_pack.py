"""Sweeps the launch parameters of `mla_kv_pack`.

    PYTHONPATH=. python tests/gpu/tune_mla_kv_pack.py --out tune.json

Prints the best configurations of each case and the tuned choice, in microseconds of GPU time, with and without
programmatic dependent launch (a compiled graph launches without). `python -m fusion_passes bench --op mla_kv_pack`
times stock code beside it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from fusion_passes import arch, benchmarking, tuning
from fusion_passes.benchmarking import Case
from fusion_passes.ops.mla_kv_pack import OP, cases

SHAPES = ((1, 1), (2, 1), (4, 1), (4, 2), (8, 1), (8, 2), (16, 2), (16, 4), (32, 4), (32, 8), (64, 8))


def configurations(case: Case) -> list[str]:
    """Rows and warps on either grid; dependent launch only where a launch is short."""
    heads = int(case.name.split()[0])
    dependent = (0, 1) if case.small else (0,)
    return [
        f"rows={rows},warps={warps},flat={flat},pdl={pdl}"
        for (rows, warps), flat, pdl in itertools.product(SHAPES, (0, 1), dependent)
        if flat or rows <= heads
    ]


def same(results: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(results, wanted, strict=True))


def sweep(case: Case, budget_s: float) -> dict[str, Any]:
    sets = benchmarking.input_sets(case, torch.device("cuda"))
    assert case.plain is not None
    wanted = case.plain(*sets[0])  # no value of these cases is beyond the range of float8
    rows: list[dict[str, Any]] = []
    for forced in configurations(case):
        with tuning.overriding(mla_kv_pack=forced):
            right = same(OP(*sets[0]), wanted)
            timing = benchmarking.measure(OP, sets, budget_s=budget_s)
        rows.append({"configuration": forced, "us": timing.gpu_us, "right": right})
    rows.sort(key=lambda row: row["us"])
    tuned = benchmarking.measure(OP, sets, budget_s=budget_s)
    floor = case.floor_us(arch.of_device(torch.device("cuda")))
    return {"case": case.name, "floor_us": floor, "tuned_us": tuned.gpu_us, "wall_us": tuned.wall_us, "sweep": rows}


def show(result: dict[str, Any]) -> None:
    print(f"{result['case']:36s} floor {result['floor_us']:6.1f}  tuned {result['tuned_us']:6.2f} us"
          f" (wall {result['wall_us']:.0f})")  # fmt: skip
    for pdl in ("pdl=0", "pdl=1"):
        for row in [row for row in result["sweep"] if row["configuration"].endswith(pdl)][:4]:
            print(f"    {row['us']:7.2f}  {row['configuration']:32s} {'' if row['right'] else 'WRONG'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all results")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of replays per measurement, at least")
    options = parser.parse_args()
    start = time.perf_counter()
    results: list[dict[str, Any]] = []
    for case in [case for case in cases() if options.only in case.name]:
        results.append(sweep(case, options.budget))
        show(results[-1])
        benchmarking.write_json(options.out, results)
    print(f"{len(results)} cases in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
