"""Sweeps the launch parameters of `qkv_split` and times stock Inductor beside it.

    PYTHONPATH=. python tests/gpu/tune_qkv_split.py --out tune.json

Prints for each case the best configurations in microseconds of GPU time (cold inputs, outputs of their own), the tuned
choice, and stock torch.compile plain, with combo kernels, and with a symbolic number of tokens. Whoever edits the
table (`ops/tuned/qkv_split.json`) or the limits of the profit rule (`PAYS_UP_TO`) reads the numbers off here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusion_passes import arch, benchmarking, tuning
from fusion_passes.benchmarking import Case
from fusion_passes.ops.qkv_split import OP, cases, plain

ROWS = [
    "rows=1,lanes=256,warps=1", "rows=2,lanes=256,warps=2", "rows=4,lanes=128,warps=2", "rows=4,lanes=256,warps=4",
    "rows=8,lanes=256,warps=4", "rows=16,lanes=256,warps=4", "rows=8,lanes=512,warps=8", "rows=2,lanes=2048,warps=8",
]  # fmt: skip
TRANSPOSED = [
    "rows=32,lanes=32,warps=1", "rows=32,lanes=32,warps=2", "rows=64,lanes=32,warps=2", "rows=32,lanes=64,warps=2",
    "rows=64,lanes=64,warps=4", "rows=64,lanes=64,warps=8", "rows=128,lanes=64,warps=8", "rows=64,lanes=128,warps=8",
    "rows=128,lanes=64,warps=4", "rows=64,lanes=128,warps=4",
]  # fmt: skip


def configurations(case: Case) -> list[str]:
    return TRANSPOSED if case.name.endswith("strided") else ROWS


def stock(symbolic: bool = False, **options: Any) -> Callable[..., Any]:
    """The case's own spelling, compiled by stock Inductor."""
    compiled = torch.compile(lambda *args: plain(*args), dynamic=None if symbolic else False, options=options or None)

    def call(x: torch.Tensor, *form: Any) -> Any:
        if symbolic:
            torch._dynamo.mark_dynamic(x, 1)
        return compiled(x, *form)

    return call


PEERS: dict[str, Callable[[], Callable[..., Any]]] = {
    "stock": stock,
    "combo": lambda: stock(combo_kernels=True),
    "stock, T symbolic": lambda: stock(symbolic=True),
}


def timed(call: Callable[..., Any], sets: list[tuple[Any, ...]], exact: Any, budget_s: float) -> dict[str, Any]:
    error = max(float((a != b).sum()) for a, b in zip(call(*sets[0]), exact))
    timing = benchmarking.measure(call, sets, budget_s=budget_s)
    return {"us": timing.gpu_us, "wall_us": timing.wall_us, "wrong": error}


def sweep(case: Case, budget_s: float, with_peers: bool) -> dict[str, Any]:
    """All configurations and peers of one case."""
    sets = benchmarking.input_sets(case, torch.device("cuda"))
    exact = case.reference(*sets[0])
    rows = []
    for forced in configurations(case):
        with tuning.overriding(qkv_split=forced):
            rows.append({"configuration": forced, **timed(OP, sets, exact, budget_s)})
    rows.sort(key=lambda row: row["us"])
    floor = case.floor_us(arch.of_device(torch.device("cuda")))
    result: dict[str, Any] = {"case": case.name, "floor_us": floor, "sweep": rows, "peers": {}}
    result["tuned"] = timed(OP, sets, exact, budget_s)
    for name, make in PEERS.items() if with_peers else ():
        torch._dynamo.reset()
        try:
            result["peers"][name] = timed(make(), sets, exact, budget_s)
        except Exception as failure:
            result["peers"][name] = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
    return result


def show(result: dict[str, Any]) -> None:
    tuned = result["tuned"]
    times = f"floor {result['floor_us']:6.1f}  tuned {tuned['us']:7.2f} us, wall {tuned['wall_us']:.0f}"
    print(f"{result['case']:44s} {times} {'WRONG' if tuned['wrong'] else ''}")
    for row in result["sweep"][:4]:
        print(f"    {row['us']:8.2f}  {row['configuration']:28s} {'WRONG' if row['wrong'] else ''}")
    for name, peer in result["peers"].items():
        print(f"    {name}: " + (peer.get("failed") or f"{peer['us']:8.2f}  wall {peer['wall_us']:.0f}"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all results")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of replays per measurement, at least")
    parser.add_argument("--no-peers", action="store_true", help="time the configurations alone")
    options = parser.parse_args()
    results = []
    for case in cases():
        if options.only in case.name:
            with torch.no_grad():
                results.append(sweep(case, options.budget, not options.no_peers))
            show(results[-1])
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
