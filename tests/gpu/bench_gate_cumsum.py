"""gate_cumsum against stock Inductor, combo_kernels, max-autotune and flash-linear-attention, in one run on one GPU.

    PYTHONPATH=. python tests/gpu/bench_gate_cumsum.py --out examples/results/gate_cumsum_h200.json

GPU time by CUDA graph replay on rotated inputs with outputs of their own, wall time per call without a graph, error
against float64. "fused" is the stock spelling compiled with backend="fusion_passes".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusion_passes
from fusion_passes import arch, benchmarking
from fusion_passes.backend import fusion_passes_backend
from fusion_passes.benchmarking import Case
from fusion_passes.ops.gate_cumsum import cases
from tests.gpu.tune_gate_cumsum import matches, peers, stock


def contestants(case: Case) -> dict[str, Callable[..., Any]]:
    """What is timed on a case; each compiled function has a code object of its own."""
    found = {"fused": torch.compile(lambda *a: stock(a), dynamic=False, backend=fusion_passes_backend)}
    found |= peers(case)
    found["max_autotune"] = torch.compile(lambda *a: stock(a), dynamic=False, mode="max-autotune-no-cudagraphs")
    return found


def measure(case: Case) -> dict[str, Any]:
    """Times and errors of every contestant on one case."""
    sets = benchmarking.input_sets(case, torch.device("cuda"))
    exact = benchmarking.exact_result(case, sets[0])
    row: dict[str, Any] = {"case": case.name, "bytes": case.bytes, "flops": case.flops}
    row["floor_us"] = round(case.floor_us(arch.of_device(torch.device("cuda"))), 1)
    for name, call in contestants(case).items():
        torch._dynamo.reset()
        before = fusion_passes.report().counts["gate_cumsum"]
        error = matches(call(*sets[0]), exact)
        timing = benchmarking.measure(call, sets, budget_s=0.02)
        row[name] = {"us": round(timing.gpu_us, 2), "wall_us": round(timing.wall_us, 1), "error": float(f"{error:.1e}")}
        if name == "fused":
            row[name]["sites"] = fusion_passes.report().counts["gate_cumsum"] - before
    return row


def main() -> None:
    """Measure all cases and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    options = parser.parse_args()
    rows = []
    with torch.no_grad():
        for case in cases():
            if options.only in case.name:
                rows.append(measure(case))
                shown = {name: value["us"] for name, value in rows[-1].items() if isinstance(value, dict)}
                walls = {name: value["wall_us"] for name, value in rows[-1].items() if isinstance(value, dict)}
                print(case.name, rows[-1]["floor_us"], shown, "wall", walls, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    environment = {**benchmarking.environment(), "copy_rate_TBps": round(benchmarking.copy_rate() / 1e12, 2)}
    options.out.write_text(json.dumps({"environment": environment, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
