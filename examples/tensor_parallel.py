"""A model split over several GPUs: its heads by DTensor, or its parameters by FSDP2.

    python examples/tensor_parallel.py                         # tiny, two processes, also without a GPU
    python examples/tensor_parallel.py --model deepseek_v32 --real --tokens 2048 --json scaling.json
    torchrun --nproc-per-node 4 examples/tensor_parallel.py --split parameters

Every process compiles the graph of its own rank. With split heads a rank's sites have the heads that it holds, with
split parameters all of them. Printed are wall times of one GPU and of all, compiled without and with the backend.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _compare
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusion_passes
from fusion_passes import hf_models

MODELS = ("kimi_linear", "deepseek_v32")
TO_HEADS = {"q_proj", "k_proj", "v_proj", "b_proj", "q_b_proj", "kv_b_proj", "g_b_proj", "f_b_proj"}
FROM_HEADS = {"o_proj"}
TO_CHANNELS, FROM_CHANNELS = {"gate_proj", "up_proj"}, {"down_proj"}
BY_OUTPUT, BY_INPUT = TO_HEADS | TO_CHANNELS, FROM_HEADS | FROM_CHANNELS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example on this rank, or start it on all; 0 if the results of every rank agree with one GPU's."""
    parser = _compare.parser(__doc__)
    parser.add_argument("--model", default="kimi_linear", choices=MODELS)
    parser.add_argument("--split", default="heads", choices=("heads", "parameters"))
    parser.add_argument("--processes", type=int, default=2, help="where torchrun does not say it")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--without-stock", action="store_true", help="compile with the backend alone")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = _compare.parsed(parser, argv, tokens=64)
    if "RANK" not in os.environ:
        given = sys.argv[1:] if argv is None else argv
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
        return subprocess.run([sys.executable, *launcher, __file__, *given]).returncode

    device, dtype = _compare.place(args.real)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    model, inputs = hf_models.build(
        args.model, dtype=dtype, layers=args.layers, seq=args.tokens, real=args.real, device=device
    )
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        backends = (True,) if args.without_stock else (False, True)
        rows = [row(model, inputs, expected, ours, 1) for ours in backends]
        (split_heads if args.split == "heads" else split_parameters)(model, mesh)
        rows += [row(model, inputs, expected, ours, mesh.size()) for ours in backends]
    everybody: list[Any] = [None] * mesh.size()
    dist.all_gather_object(everybody, rows)
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        tell(args.model, args.split, f"{args.tokens} tokens, {args.layers} layers, {dtype}", everybody, args.json)
    allowed = _compare.TOLERANCE[dtype]
    return 0 if all(found["error"] <= allowed for rank in everybody for found in rank) else 1


# --- splitting -------------------------------------------------------------------------------------------------------


def split_heads(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism: projections to heads and from heads by DTensor, what belongs to single heads by hand."""
    world, rank = mesh.size(), mesh.get_local_rank()

    def local(tensor: Tensor, axis: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(tensor.detach().chunk(world, axis)[rank].clone(), requires_grad=False)

    for name, module in list(model.named_modules()):
        kind = name.rpartition(".")[2]
        if ".indexer." in name:
            continue  # its scores are sums over all heads: every rank computes them all
        if kind in BY_OUTPUT | BY_INPUT:
            parallelize_module(module, mesh, ColwiseParallel() if kind in BY_OUTPUT else RowwiseParallel())
        if hasattr(module, "qkv_dim"):
            module.qkv_dim //= world
        if kind == "conv1d":  # one filter for each channel of queries, keys and values
            filters = local(module.weight.unflatten(0, (3, -1)), 1)
            module.weight = torch.nn.Parameter(filters.flatten(0, 1), requires_grad=False)
        if hasattr(module, "A_log"):
            module.A_log, module.dt_bias = local(module.A_log, 2), local(module.dt_bias, 0)


def split_parameters(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2: a rank holds a part of every parameter, and a layer's are gathered when it runs."""
    for layer in model.get_submodule("layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


# --- measuring -------------------------------------------------------------------------------------------------------


def row(model: torch.nn.Module, inputs: dict[str, Any], expected: Tensor, ours: bool, gpus: int) -> dict[str, Any]:
    """What one compile of the model takes and finds on this rank."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how: dict[str, Any] = {"backend": "fusion_passes", "options": _compare.options(expected.device.type)}
    compiled = torch.compile(model, **(how if ours else {}))
    actual = compiled(**inputs).last_hidden_state
    report = fusion_passes.report()
    return {
        "gpus": gpus,
        "compiled": "fused" if ours else "stock",
        "wall_ms": round(wall_ms(lambda: compiled(**inputs)), 3),
        "error": float(f"{_compare.error(actual, expected):.1e}"),
        "sites": {name: count for name, count in report.counts.items() if count},
        "what": [record.reason for record in report.fused],
    }


def wall_ms(call: Callable[[], Any], calls: int = 20) -> float:
    """The median wall time of a call that all ranks start together."""
    taken = []
    for _ in range(calls):
        dist.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[1:])


def tell(model: str, split: str, size: str, everybody: list[list[dict[str, Any]]], path: Path | None) -> None:
    """Print a table of the slowest rank's times, and what each rank found; write the same as JSON."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{model}, {split} split, {size}, {gpu}\n")
    print("| GPUs | compiled | wall ms | largest error | sites of each rank |\n|---|---|---|---|---|")
    for found in zip(*everybody):
        slowest, worst = (max(rank[key] for rank in found) for key in ("wall_ms", "error"))
        sites = ", ".join(f"{name} {count}" for name, count in found[0]["sites"].items()) or "–"
        print(f"| {found[0]['gpus']} | {found[0]['compiled']} | {slowest:.2f} | {worst:.0e} | {sites} |")
    for rank, rows in enumerate(everybody):
        print(f"\nrank {rank}: {'; '.join(rows[-1]['what'])}")
    if path is not None:
        versions = {"torch": torch.__version__, "gpu": gpu}
        told = {"model": model, "split": split, "size": size, "environment": versions, "ranks": everybody}
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
