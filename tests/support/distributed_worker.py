"""What every rank of `tests/test_distributed.py` runs, under torchrun on CPUs: a layer split over the ranks."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusion_passes

HEADS, CHANNELS, WIDTH, TOKENS = 4, 32, 48, 128


class Layer(torch.nn.Module):
    """A gate of Kimi delta attention between two projections; heads of a rank are those that its weights hold."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(WIDTH, HEADS * CHANNELS, bias=False)
        self.out = torch.nn.Linear(HEADS * CHANNELS, WIDTH, bias=False)
        self.a_log = torch.nn.Parameter(torch.linspace(-1, 1, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        raw = self.proj(x).unflatten(-1, (-1, CHANNELS))
        gate = -self.a_log.exp()[:, None] * torch.nn.functional.softplus(raw)
        sums = gate.view(x.shape[0], -1, 64, *gate.shape[2:]).cumsum(2)
        return self.out(sums.flatten(1, 2).flatten(2))


def split_heads(layer: Layer, world: int, rank: int) -> None:
    """Tensor parallelism: projections by DTensor, the parameters of the heads by hand."""
    parallelize_module(layer, init_device_mesh("cpu", (world,)), {"proj": ColwiseParallel(), "out": RowwiseParallel()})
    layer.a_log = torch.nn.Parameter(layer.a_log.detach().chunk(world)[rank].clone())


def shard_parameters(layer: Layer, world: int, rank: int) -> None:
    fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        expected = layer(x)
        {"heads": split_heads, "parameters": shard_parameters}[sys.argv[1]](layer, world, rank)
        options: Any = {"fusion_passes.reference_on_cpu": True, "fusion_passes.strict": True}
        found = torch.compile(layer, backend="fusion_passes", options=options)(x)
    report = fusion_passes.report()
    error = float((found - expected).norm() / expected.norm())
    summary = {"rank": rank, "error": error, "what": [r.reason for r in report.fused if r.fusion == "gate_cumsum"]}
    everybody: list[Any] = [None] * world
    dist.all_gather_object(everybody, summary)
    if rank == 0:
        print(json.dumps(everybody))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
