"""Whole Hugging Face models on the GPU: eager, stock Inductor, combo_kernels and fusion_passes in one run.

    PYTHONPATH=. python tests/gpu/models.py --models kimi_linear qwen3_next --tokens 2048 --out result.json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fusion_passes
from fusion_passes import benchmarking, hf_models
from fusion_passes.backend import fusion_passes_backend

VARIANTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "combo": {"options": {"combo_kernels": True}},
    "fused": {"backend": fusion_passes_backend},
}


def wall_ms(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median wall time of a call that is waited for, in milliseconds."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def gpu_ms(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a CUDA graph replay of the call, in milliseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(name: str, tokens: int, batch: int, layers: int, variants: list[str]) -> dict[str, Any]:
    """Times, memory, first-call time, fused sites and difference from eager of one model, per variant."""
    model, inputs = hf_models.build(
        name, dtype=torch.bfloat16, layers=layers, seq=tokens, batch=batch, real=True, device="cuda"
    )
    row: dict[str, Any] = {"model": name, "tokens": tokens, "batch": batch, "layers": layers}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state.double()
        for variant in variants:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            compiled = torch.compile(model, fullgraph=True, **VARIANTS[variant])
            start = time.perf_counter()
            out = compiled(**inputs).last_hidden_state.double()
            torch.cuda.synchronize()
            first = time.perf_counter() - start
            torch.cuda.reset_peak_memory_stats()
            call = functools.partial(compiled, **inputs)
            call()
            row[variant] = {
                "first_call_s": round(first, 1),
                "wall_ms": round(wall_ms(call), 3),
                "gpu_ms": round(gpu_ms(call), 3),
                "peak_mb": torch.cuda.max_memory_allocated() >> 20,
                "sites": dict(fusion_passes.report().counts),
                "error": float((out - expected).norm() / expected.norm()),
            }
            print(name, tokens, variant, row[variant], flush=True)
            if variant == "fused":
                print(fusion_passes.report(), flush=True)
    return row


def main() -> None:
    """Measure the models named on the command line and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["kimi_linear", "qwen3_next"], choices=hf_models.NAMES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=["stock", "fused"], choices=list(VARIANTS))
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = [measure(m, t, args.batch, args.layers, args.variants) for m in args.models for t in args.tokens]
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"environment": benchmarking.environment(), "models": rows}, file, indent=1)


if __name__ == "__main__":
    main()
