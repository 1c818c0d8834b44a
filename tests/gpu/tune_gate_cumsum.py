"""Sweeps the launch parameters of `gate_cumsum` and times its peers beside it.

    PYTHONPATH=. python tests/gpu/tune_gate_cumsum.py --out tune.json

Prints the best five configurations of each case in microseconds of GPU time, and for the main cases the tuned
choice, stock torch.compile with and without combo kernels, and flash-linear-attention where it is installed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import itertools
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusion_passes import arch, benchmarking, tuning
from fusion_passes.benchmarking import Case
from fusion_passes.ops.gate_cumsum import OP, cases

CHANNEL = [
    *(f"rows={r},lanes={n},warps=1,serial=1" for r, n in itertools.product((8, 16, 32, 64), (32, 64, 128))
      if r * n <= 4096),
    "rows=16,lanes=128,warps=2,serial=1", "rows=32,lanes=128,warps=2,serial=1", "rows=64,lanes=128,warps=4,serial=1",
    "rows=64,lanes=32,warps=1,serial=0", "rows=64,lanes=32,warps=2,serial=0", "rows=64,lanes=64,warps=4,serial=0",
    "rows=32,lanes=64,warps=2,serial=0", "rows=16,lanes=128,warps=1,serial=0", "rows=64,lanes=16,warps=1,serial=0",
]  # fmt: skip
HEAD = [
    *(f"rows=64,lanes={n},warps={w},serial=0"
      for n, w in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (32, 4))),
    "rows=32,lanes=8,warps=1,serial=0", "rows=64,lanes=8,warps=1,serial=1", "rows=64,lanes=32,warps=1,serial=1",
]  # fmt: skip
BASELINES = ("KDA 32x128 T=512", "KDA 32x128 T=4096", "KDA 32x128 T=16384", "KDA 8x128 T=4096", "GDN 32x1 T=4096")


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


def stock(args: tuple[Any, ...]) -> torch.Tensor:
    """The model's own spelling of the case."""
    raw, a_log, bias, chunks, chunk_size, *_, layout, _, _ = args
    batch, tokens, groups, heads, channels = raw.shape
    gate = -a_log[..., :1].float().exp() * torch.nn.functional.softplus(raw.float() + bias)
    gate = gate.view(batch, chunks, chunk_size, heads, channels)
    if layout == "bhnck":
        return gate.permute(0, 3, 1, 2, 4).contiguous().cumsum(3)
    return gate.cumsum(2)


def peers(case: Case) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {"stock": torch.compile(lambda *a: stock(a), dynamic=False)}
    found["combo"] = torch.compile(lambda *a: stock(a), dynamic=False, options={"combo_kernels": True})
    if case.name.endswith("bnchk"):
        try:
            if case.name.startswith("KDA"):
                kda = importlib.import_module("fla.ops.kda.gate").kda_gate_chunk_cumsum
                found["fla"] = lambda raw, a, bias, *_: kda(
                    raw.squeeze(2), a[0, :, 0], chunk_size=64, dt_bias=bias.flatten()
                )
            else:
                gdn = importlib.import_module("fla.ops.gated_delta_rule.gate").gdn_gate_chunk_cumsum
                found["fla"] = lambda raw, a, bias, *_: gdn(
                    raw.squeeze(2).squeeze(-1), a[0, :, 0], chunk_size=64, dt_bias=bias.flatten()
                )
        except ImportError as error:
            print(f"flash-linear-attention is not there: {error}")
    return found


def matches(out: torch.Tensor, exact: torch.Tensor) -> float:
    return benchmarking.relative_error(out.reshape(exact.shape), exact)


def sweep(case: Case, budget_s: float) -> dict[str, Any]:
    sets = benchmarking.input_sets(case, torch.device("cuda"))
    exact = benchmarking.exact_result(case, sets[0])
    rows: list[dict[str, Any]] = []
    for forced in configurations(case):
        with tuning.overriding(gate_cumsum=forced):
            error = matches(OP(*sets[0]), exact)
            timing = benchmarking.measure(OP, sets, budget_s=budget_s)
        rows.append({"configuration": forced, "us": timing.gpu_us, "wall_us": timing.wall_us, "error": error})
    rows.sort(key=lambda row: row["us"])
    tuned = benchmarking.measure(OP, sets, budget_s=budget_s)
    floor = case.floor_us(arch.of_device(torch.device("cuda")))
    result: dict[str, Any] = {"case": case.name, "floor_us": floor, "sweep": rows, "tuned_us": tuned.gpu_us,
                              "tuned_wall_us": tuned.wall_us}  # fmt: skip
    if case.name.rsplit(" ", 1)[0] in BASELINES:
        result["peers"] = {}
        for name, call in peers(case).items():
            try:
                torch._dynamo.reset()
                error = matches(call(*sets[0]), exact)
                timing = benchmarking.measure(call, sets, budget_s=budget_s)
                result["peers"][name] = {"us": timing.gpu_us, "wall_us": timing.wall_us, "error": error}
            except Exception as failure:
                result["peers"][name] = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{result['case']:28s} floor {result['floor_us']:6.1f}  tuned {result['tuned_us']:6.1f} us"
          f" (wall {result['tuned_wall_us']:.0f})")  # fmt: skip
    for row in result["sweep"][:5]:
        print(f"    {row['us']:7.2f}  {row['configuration']:38s} error {row['error']:.1e}")
    for name, peer in result.get("peers", {}).items():
        text = peer.get("failed") or f"{peer['us']:7.2f}  error {peer['error']:.1e}  wall {peer['wall_us']:.0f}"
        print(f"    {name}: {text}")


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
