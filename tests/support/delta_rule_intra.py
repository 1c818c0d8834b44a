"""Shared by the tests of the intra-chunk part of the delta rule: its results by definition, and drawn operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusion_passes.graph_pass import FusionPass
from fusion_passes.records import Record
from fusion_passes.settings import snapshot
from tests.support.delta_rule import operands

Tensor = torch.Tensor


def sums_of(g: Tensor, chunk: int) -> Tensor:
    """[B, HV, N, C] or [B, HV, N, C, K], float32: sums of the log decays [B, T, HV] or [B, T, HV, K] within chunks."""
    g = g.movedim(2, 1)
    tail = -g.shape[2] % chunk
    g = torch.cat([g, g.new_zeros(*g.shape[:2], tail, *g.shape[3:])], 2)
    return g.unflatten(2, (-1, chunk)).cumsum(3)


def intra_operands(chunk: int = 64, *, query: bool = True, **sizes: Any) -> dict[str, Any]:
    """k, v, sums, beta, q by name; sizes as for `operands`."""
    drawn = operands(**sizes)
    sums = sums_of(drawn["g"], chunk)
    return {"k": drawn["k"], "v": drawn["v"], "sums": sums, "beta": drawn["beta"], "q": drawn["q"] if query else None}


def exact(
    k: Tensor, v: Tensor, sums: Tensor, beta: Tensor, q: Tensor | None, scale: float, norm_eps: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """u, w and pairs in float64, row by row from the definition."""
    k, v, sums, beta = (t.double() for t in (k, v, sums, beta))

    def unit(x: Tensor) -> Tensor:
        return x if norm_eps is None else x / (x.square().sum(-1, keepdim=True) + norm_eps).sqrt()

    k, q = unit(k), None if q is None else unit(q.double())
    batch, heads, chunks, length = sums.shape[:4]
    sums = (sums if sums.dim() == 5 else sums[..., None]).clamp_min(-1e30)
    u = torch.zeros(batch, heads, chunks, length, v.shape[-1], dtype=torch.float64)
    w = torch.zeros(batch, heads, chunks, length, k.shape[-1], dtype=torch.float64)
    pairs = torch.zeros(batch, heads, chunks, length, length, dtype=torch.float64)
    owner = torch.arange(heads) // (heads // k.shape[2])
    for t in range(k.shape[1]):
        n, i = divmod(t, length)
        rows = slice(n * length, t + 1)
        decay = (sums[:, :, n, i : i + 1] - sums[:, :, n, : i + 1]).exp()  # [B, H, i + 1, K or 1]
        keys = k[:, rows][:, :, owner].transpose(1, 2) * decay
        system = (keys[:, :, :i] * k[:, t, owner][:, :, None]).sum(-1, keepdim=True)
        strength = beta[:, t, :, None]
        u[:, :, n, i] = strength * (v[:, t] - (system * u[:, :, n, :i]).sum(2))
        w[:, :, n, i] = strength * (k[:, t, owner] * sums[:, :, n, i].exp() - (system * w[:, :, n, :i]).sum(2))
        if q is not None:
            pairs[:, :, n, i, : i + 1] = scale * (keys * q[:, t, owner][:, :, None]).sum(-1)
    return u, w, None if q is None else pairs


def passed_with_symbolic_tokens(f: Callable[[Tensor], Any], x: Tensor) -> tuple[GraphModule, list[Record]]:
    """The ATen graph of `f(x)`, x [B, T, D] with a symbol for T, after the pass, and the pass's records.

    Traced without Dynamo and Inductor's own passes, which takes a quarter of the time.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    fake = mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    functional = torch.func.functionalize(f, remove="mutations")
    with mode, enable_python_dispatcher():
        module = make_fx(functional, decomposition_table=select_decomp_table())(fake)
    view_to_reshape(module)
    module.graph.eliminate_dead_code()
    explained = FusionPass(snapshot({"strict": True, "reference_on_cpu": True}))
    explained(module.graph)
    module.recompile()
    return module, explained.found
