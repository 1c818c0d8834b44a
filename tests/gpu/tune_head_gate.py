"""Sweeps the launch parameters of `head_gate` and times stock Inductor beside it.

    PYTHONPATH=. python tests/gpu/tune_head_gate.py --out tune.json

Prints for each case the best configurations in microseconds of GPU time (cold inputs, outputs of their own) with their
error against float64, the tuned choice, the choice for a symbolic number of rows, and stock torch.compile, plain and
with combo kernels. Whoever edits the table (`ops/tuned/head_gate.json`) or the limit of the profit rule
(`PAYS_UP_TO`) reads the numbers off here.
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
from fusion_passes.ops._head_gate_cases import plain
from fusion_passes.ops.head_gate import OP, TABLE, cases
from tests.gpu.sweeps import attempt, stock_peers

TENSOR = "rows={},heads={},depth={},splits={},warps={},stages={},tensor=1"
ROW = ("tensor=0,depth=1024,warps=4", "tensor=0,depth=2048,warps=8", "tensor=0,depth=512,warps=2")
# rows, heads, depth, splits, warps, stages by dtype of the weights, for up to 16 rows, up to 256, and more
FEW = {
    "bfloat16": [(16, 16, 256, 28, 4, 2), (16, 16, 256, 14, 4, 3), (16, 64, 128, 56, 4, 3)],
    "float32": [(16, 16, 128, 28, 4, 3), (16, 32, 64, 56, 4, 3), (16, 64, 64, 56, 4, 3)],
}
SOME = {
    "bfloat16": [
        (16, 32, 128, 14, 4, 4),
        (16, 64, 128, 28, 4, 4),
        (32, 32, 128, 28, 4, 4),
        (32, 64, 128, 28, 4, 4),
        (16, 32, 256, 14, 4, 2),
        (16, 16, 128, 7, 4, 4),
        (64, 64, 128, 28, 4, 4),
    ],
    "float32": [
        (16, 32, 128, 14, 4, 3),
        (16, 64, 64, 28, 4, 4),
        (32, 32, 64, 28, 4, 4),
        (32, 64, 64, 28, 4, 4),
        (16, 16, 128, 7, 4, 3),
        (16, 64, 128, 28, 4, 3),
        (32, 64, 64, 14, 4, 3),
    ],
}
MANY = {
    "bfloat16": [
        (64, 64, 128, 4, 4, 4), (64, 64, 128, 8, 4, 3), (128, 64, 64, 8, 4, 4), (128, 64, 128, 8, 8, 3),
        (32, 64, 128, 2, 4, 4), (64, 64, 256, 4, 4, 2), (64, 64, 64, 4, 4, 5),
    ],
    "float32": [
        (64, 64, 64, 4, 4, 4), (64, 64, 64, 4, 4, 3), (128, 64, 64, 8, 4, 3), (128, 64, 64, 8, 8, 4),
        (32, 64, 64, 2, 4, 4), (64, 64, 32, 4, 4, 5), (64, 64, 128, 4, 4, 3),
    ],
}  # fmt: skip


def configurations(case: Case) -> list[str]:
    _, tokens, kind = case.name.split()[:3]
    rows = int(tokens.removeprefix("T="))
    if rows <= 16:
        return [*ROW, *(TENSOR.format(*c) for c in FEW[kind])]
    return [TENSOR.format(*c) for c in (SOME if rows <= 256 else MANY)[kind]]


def symbolic(case: Case) -> str:
    """The parameters that a symbolic number of rows gets."""
    kind = "half" if "bfloat16" in case.name else "split"
    name = arch.of_device(torch.device("cuda")).name
    (row,) = TABLE.entries.get(name, TABLE.entries["default"])[f"{kind}_symbolic"]
    return ",".join(f"{key}={row[key]}" for key in TABLE.names)


PEERS = stock_peers(plain)


def timed(
    call: Callable[..., Any], sets: list[tuple[Any, ...]], exact: torch.Tensor, budget_s: float
) -> dict[str, Any]:
    error = float((call(*sets[0]).double() - exact).norm() / exact.norm())
    timing = benchmarking.measure(call, sets, budget_s=budget_s)
    return {"us": timing.gpu_us, "wall_us": timing.wall_us, "error": error}


def _timed_peer(name: str, *rest: Any) -> dict[str, Any]:
    return timed(PEERS[name](), *rest)


def sweep(case: Case, budget_s: float, peers: list[str]) -> dict[str, Any]:
    """All configurations and peers of one case."""
    sets = benchmarking.input_sets(case, torch.device("cuda"))
    exact = case.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in sets[0]))
    rows = []
    for forced in (*configurations(case), symbolic(case)):
        with tuning.overriding(head_gate=forced):
            found = attempt(functools.partial(timed, OP, sets, exact, budget_s))
        rows.append({"configuration": forced, "symbolic": forced == symbolic(case), **found})
    rows.sort(key=lambda row: row["us"])
    floor = case.floor_us(arch.of_device(torch.device("cuda")))
    result: dict[str, Any] = {"case": case.name, "floor_us": floor, "sweep": rows, "peers": {}}
    result["tuned"] = timed(OP, sets, exact, budget_s)
    for name in peers:
        torch._dynamo.reset()
        result["peers"][name] = attempt(functools.partial(_timed_peer, name, sets, exact, budget_s))
    return result


def show(result: dict[str, Any]) -> None:
    tuned = result["tuned"]
    peers = ", ".join(f"{name} {peer['us']:.2f} ({peer.get('error', 0):.0e})" for name, peer in result["peers"].items())
    times = f"floor {result['floor_us']:5.1f}  tuned {tuned['us']:6.2f} ({tuned['error']:.0e})"
    print(f"{result['case']:34s} {times}  {peers}")
    for index, row in enumerate(result["sweep"]):
        if index < 3 or row["symbolic"]:
            note = row.get("failed") or f"{row['error']:.0e}" + (" symbolic" if row["symbolic"] else "")
            print(f"    {row['us']:7.2f}  {row['configuration']:58s} {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all results")
    parser.add_argument("--only", default="7168x64", help="part of the names of the cases to run")
    parser.add_argument("--tokens", default="1,64,2048,8192", help="numbers of rows to run")
    parser.add_argument("--budget", type=float, default=0.01, help="seconds of replays per measurement, at least")
    parser.add_argument("--peers", default="stock", help="peers to time, such as stock,combo")
    options = parser.parse_args()
    begin, results = time.perf_counter(), []
    wanted = {f"T={tokens}" for tokens in options.tokens.split(",")}
    for case in cases():
        if options.only in case.name and "q_scale" not in case.name and case.name.split()[1] in wanted:
            with torch.no_grad():
                results.append(sweep(case, options.budget, list(filter(None, options.peers.split(",")))))
            show(results[-1])
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{len(results)} cases in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
