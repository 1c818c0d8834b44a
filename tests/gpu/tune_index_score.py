"""Times launch parameters of `index_score`, with stock Inductor beside them.

    PYTHONPATH=. python tests/gpu/tune_index_score.py --out tune.json --only "bf16 2048x8192 H=64 causal"
    PYTHONPATH=. python tests/gpu/tune_index_score.py --out tune.json --only "fp8 64x" --try "queries=4;warps=8"

Prints for each case the floor that memory and matrix units allow, the tuned choice, the peers, and all configurations,
best first: microseconds of GPU time (cold inputs, outputs of their own) and the error against float64. A configuration
names what differs from the tuned choice. Whoever edits `ops/tuned/index_score.json` reads it off here.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusion_passes import arch, benchmarking, tuning
from fusion_passes.benchmarking import Case
from fusion_passes.ops._index_score_cases import plain
from fusion_passes.ops.index_score import OP, cases
from tests.gpu.sweeps import attempt, stock_peers
from tests.support.index_score import Arguments, expected_in_chunks, in_batch_order, relative_error

FORM = "keys={},queries={},columns={},warps={},stages={}"
# keys, queries, columns, warps, stages
PREFILL = {
    "bf16": [
        (256, 32, 64, 8, 3), (256, 64, 64, 8, 3), (256, 128, 64, 8, 3), (256, 32, 64, 8, 4), (128, 32, 64, 4, 3),
        (128, 32, 128, 8, 3), (128, 64, 128, 4, 2), (512, 32, 64, 16, 2),
    ],
    "fp8": [
        (256, 32, 64, 8, 3), (256, 64, 64, 8, 4), (256, 128, 64, 8, 4), (128, 32, 64, 4, 4), (128, 64, 128, 8, 3),
        (128, 64, 128, 4, 3), (512, 32, 64, 16, 3), (512, 64, 64, 16, 4),
    ],
    "fp32": [(64, 32, 64, 4, 2), (64, 32, 64, 8, 2), (128, 32, 64, 8, 1), (32, 32, 64, 4, 3)],
}  # fmt: skip
CHUNK = [
    (256, 8, 64, 8, 3), (256, 16, 64, 8, 3), (256, 4, 64, 8, 2), (128, 8, 64, 4, 3), (128, 16, 64, 4, 3),
    (128, 4, 64, 4, 2), (64, 16, 64, 4, 3), (128, 8, 128, 8, 3),
]  # fmt: skip
DECODE = [
    (64, 1, 64, 4, 1), (128, 1, 64, 4, 1), (128, 1, 64, 8, 1), (256, 1, 64, 8, 1), (64, 1, 64, 2, 1), (64, 4, 64, 4, 2),
    (128, 4, 64, 4, 2), (32, 1, 64, 4, 1),
]  # fmt: skip


def configurations(case: Case) -> list[str]:
    kind, shape = case.name.split()[:2]
    queries = int(shape.split("x")[0])
    rows = DECODE if queries <= 16 else CHUNK if queries <= 128 else PREFILL[kind]
    return [FORM.format(*row) for row in rows]


PEERS = stock_peers(plain)


def timed(
    call: Callable[..., Any], sets: list[tuple[Any, ...]], exact: torch.Tensor, budget_s: float
) -> dict[str, Any]:
    error = relative_error(in_batch_order(call(*sets[0]), sets[0][-1]), exact)
    timing = benchmarking.measure(call, sets, budget_s=budget_s)
    return {"us": timing.gpu_us, "least_us": timing.gpu_min_us, "wall_us": timing.wall_us, "error": error}


def sweep(case: Case, forced: list[str], budget_s: float, peers: list[str], until: float) -> dict[str, Any]:
    """The configurations and peers of one case, as many as there is time for."""
    sets = benchmarking.input_sets(case, torch.device("cuda"))
    exact = expected_in_chunks(Arguments(*sets[0]))
    result: dict[str, Any] = {"case": case.name, "floor_us": case.floor_us(arch.of_device(torch.device("cuda")))}
    result["tuned"] = attempt(functools.partial(timed, OP, sets, exact, budget_s))
    rows: list[dict[str, Any]] = []
    for configuration in forced:
        if time.perf_counter() > until:
            print(f"no time left for {len(forced) - len(rows)} configurations")
            break
        with tuning.overriding(index_score=configuration):
            found = attempt(functools.partial(timed, OP, sets, exact, budget_s))
        rows.append({"configuration": configuration, **found})
    result["sweep"] = sorted(rows, key=lambda row: row["us"])
    result["peers"] = {}
    for name in peers:
        torch._dynamo.reset()
        result["peers"][name] = attempt(functools.partial(timed, PEERS[name](), sets, exact, budget_s))
    return result


def show(result: dict[str, Any]) -> None:
    def words(row: dict[str, Any]) -> str:
        return f"{row['us']:9.2f}  {row.get('failed') or format(row['error'], '.0e')}"

    print(f"{result['case']}: floor {result['floor_us']:.1f}")
    for name, row in (("tuned", result["tuned"]), *result["peers"].items()):
        print(f"    {name:50s} {words(row)}")
    for row in result["sweep"]:
        print(f"    {row['configuration']:50s} {words(row)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all results")
    parser.add_argument("--only", default="bf16 2048x8192 H=64 causal", help="parts of the names of cases, by commas")
    parser.add_argument("--try", dest="forced", default="", help="configurations to time, by semicolons")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of replays per measurement, at least")
    parser.add_argument("--limit", type=float, default=45.0, help="seconds after which no further configuration starts")
    parser.add_argument("--peers", default="", help="peers to time, such as stock,combo")
    options = parser.parse_args()
    begin, results = time.perf_counter(), []
    wanted = options.only.split(",")
    for case in cases():
        if not any(part in case.name for part in wanted) or time.perf_counter() - begin > options.limit:
            continue
        forced = [f for f in options.forced.split(";") if f] or configurations(case)
        peers = [name for name in options.peers.split(",") if name]
        with torch.no_grad():
            results.append(sweep(case, forced, options.budget, peers, begin + options.limit))
        show(results[-1])
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        torch.cuda.empty_cache()
    print(f"{len(results)} cases in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
