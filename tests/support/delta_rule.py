"""Shared by the tests of the delta rule: the recurrence token by token in float64, and drawn operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch.fx import GraphModule

from fusion_passes.graph_pass import FusionPass
from fusion_passes.records import Record
from fusion_passes.settings import snapshot
from tests.tracing import trace

Tensor = torch.Tensor


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, initial_state: Tensor | None = None,
    bounds: Sequence[int] | None = None, scale: float = 1.0, norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o [B, T, HV, V], states [B or S, HV, K, V]) in float64, from the definition; g is the log decay."""
    q, k, v, g, beta = (t.double() for t in (q, k, v, g, beta))
    if norm_eps is not None:
        q, k = (x / (x.square().sum(-1, keepdim=True) + norm_eps).sqrt() for x in (q, k))
    heads = torch.arange(v.shape[2]) // (v.shape[2] // k.shape[2])
    q, k = q[:, :, heads] * scale, k[:, :, heads]
    g = g if g.dim() == 4 else g[..., None].expand(*g.shape, k.shape[-1])
    out = torch.full_like(v, math.nan)
    states = []
    edges = [0, q.shape[1]] if bounds is None else bounds
    for index, (start, end) in enumerate(zip(edges, edges[1:])):
        state = torch.zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1], dtype=torch.float64)
        if initial_state is not None:
            state = (initial_state if bounds is None else initial_state[index : index + 1]).double()
        for t in range(start, end):
            state = state * g[:, t].exp()[..., None]
            delta = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * delta)
            out[:, t] = torch.einsum("bhkv,bhk->bhv", state, q[:, t])
        states.append(state)
    return out, torch.cat(states) if states else torch.empty(0)


def operands(
    batch: int = 2, tokens: int = 70, key_heads: int = 2, value_heads: int = 4, key: int = 8, value: int = 16, *,
    per_channel: bool = False, dtype: torch.dtype = torch.float32, decay: float = 0.2, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """q, k, v, g, beta by name: keys of length about one, log decays from -2 * decay to 0, beta from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    gates = (batch, tokens, value_heads, key) if per_channel else (batch, tokens, value_heads)
    return {
        "q": (draw(batch, tokens, key_heads, key) / key**0.5).to(dtype),
        "k": (draw(batch, tokens, key_heads, key) / key**0.5).to(dtype),
        "v": draw(batch, tokens, value_heads, value).to(dtype),
        "g": -2 * decay * torch.rand(gates, generator=generator),
        "beta": torch.rand(batch, tokens, value_heads, generator=generator).to(dtype),
    }


def passed(f: Callable[..., Any], *args: Tensor, symbolic: bool = False) -> tuple[GraphModule, list[Record]]:
    """The ATen graph of `f` after the pass, and the pass's records; with `symbolic`, all sizes are symbols.

    Traced without Dynamo and Inductor's own passes, which takes a quarter of the time.
    """
    names = ", ".join(f"x{i}" for i in range(len(args)))
    counted = eval(f"lambda {names}: f({names})", {"f": f})  # make_fx counts parameters
    module = trace(counted, *args, symbolic=symbolic)
    view_to_reshape(module)
    module.graph.eliminate_dead_code()
    explained = FusionPass(snapshot({"strict": True, "reference_on_cpu": True}))
    explained(module.graph)
    module.recompile()
    return module, explained.found
