"""What `delta_rule_intra` is benchmarked on: shapes of released models, their own spelling, flash-linear-attention.

The gates are those of freshly initialised models: A from 1 to 16, steps from 0.001 to 0.1; "strong" ones are 50 times
as strong, where whole states vanish within a few tokens.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch

from fusion_passes.benchmarking import Call, Case
from fusion_passes.ops.delta_rule_intra import OP, reference

Tensor = torch.Tensor

DIM, CHUNK, EPS = 128, 64, 1e-6
# One rounding of the results to bfloat16 is 1.7e-3, where flash-linear-attention is at 1.7e-3 (one decay per head) and
# 2.5e-3 (per channel).
BOUND = 2.5e-3
# Pairs with a decay per channel: two factors and the result, 1.7e-3 for the rounding of each.
PAIRS_BOUND = 3e-3
# Before it is compiled, the plain spelling forms the decays of all pairs of tokens: 64 MiB per chunk of 32 heads.
MOST_PLAIN_TOKENS = 4096


def cases() -> list[Case]:
    """Kimi Linear (KDA) and Qwen3-Next (GDN) layers, whole and split over four GPUs.

    Rows are bfloat16, k normalised beforehand, and u and w bfloat16, as for other kernels. "In models": as graphs of
    Hugging Face models have it, with norms inside, pairs, and results in float32.

    Bytes: inputs read once and results written once. FLOPs: per token and value head the triangles of pairs of a chunk,
    64 K for one product and 64 (K + V) for the solutions.
    """
    found = []
    for shape, small in (((True, 32, 32), (True, 8, 8)), ((False, 16, 32), (False, 4, 8))):
        found += [_case(*shape, tokens) for tokens in (512, 4096, 16384)]
        found += [_case(*small, 4096), _case(*shape, 4096, pairs=True), _case(*shape, 4096, pairs=True, model=True)]
    return [*found, _case(True, 32, 32, 4096, strong=True)]


def _case(
    per_channel: bool, key_heads: int, heads: int, tokens: int, *, pairs: bool = False, model: bool = False,
    strong: bool = False,
) -> Case:  # fmt: skip
    reads = 2 * (key_heads * (2 if pairs else 1) + heads) * DIM + 2 * heads + 4 * heads * (DIM if per_channel else 1)
    writes = (4 if model else 2) * heads * (2 * DIM + (CHUNK if pairs else 0))
    kind = "in models" if model else "with pairs" if pairs else "strong decay" if strong else ""
    name = f"{'KDA' if per_channel else 'GDN'} {key_heads}/{heads}x{DIM} T={tokens} {kind}"
    return Case(
        name.rstrip(),
        call,
        functools.partial(_arguments, per_channel, key_heads, heads, tokens, pairs, model, strong),
        bytes=(reads + writes) * tokens,
        flops=tokens * heads * CHUNK * DIM * (4 if pairs else 3),
        reference=exact,
        plain=plain if tokens <= MOST_PLAIN_TOKENS else None,
        peers={} if pairs else {"fla": functools.partial(_fla, per_channel)},
        fusion="delta_rule_intra",
        bound=PAIRS_BOUND if pairs and per_channel else BOUND,
    )


def _arguments(
    per_channel: bool, key_heads: int, heads: int, tokens: int, pairs: bool, model: bool, strong: bool,
    device: torch.device, generator: torch.Generator,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the op, the log decays [1, HV, N, C] or [1, HV, N, C, K] whose sums it takes, and these sums as
    flash-linear-attention takes them: to the base 2, [1, T, HV] or [1, T, HV, K].
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    channels = (DIM,) if per_channel else ()
    step = torch.exp(uniform(heads, 1, 1, *channels) * math.log(100.0)) * 1e-3 * (50.0 if strong else 1.0)
    bias = step + torch.log(-torch.expm1(-step))  # softplus(bias) = step
    raw = normal(1, heads, tokens // CHUNK, CHUNK, *channels) * 0.2
    rate = 1 + 15 * uniform(heads, 1, 1, *(1 for _ in channels))
    decay = -rate * torch.nn.functional.softplus(raw + bias)
    q, k, v = (normal(1, tokens, h, DIM) for h in (key_heads, key_heads, heads))
    if not model:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    beta = torch.sigmoid(normal(1, tokens, heads)).bfloat16()
    form = (DIM**-0.5, EPS if model else None, "u,w", False, False, torch.float32 if model else torch.bfloat16)
    sums = decay.cumsum(3)
    base_2 = None if pairs else (sums * math.log2(math.e)).movedim(1, 3).flatten(1, 2).contiguous()
    return (k.bfloat16(), v.bfloat16(), sums, beta, q.bfloat16() if pairs else None, *form, decay, base_2)


def call(*args: Any) -> tuple[Tensor, ...]:
    """The op's results that hold anything."""
    return OP(*args[:-2])[: 2 if args[4] is None else 3]


def exact(*args: Any) -> tuple[Tensor, ...]:
    """`call` in plain PyTorch."""
    return reference(*args[:-2])[: 2 if args[4] is None else 3]


def plain(
    k: Tensor, v: Tensor, sums: Tensor, beta: Tensor, q: Tensor | None, scale: float, norm_eps: float | None,
    results: str, columns: bool, chunks_first: bool, out_dtype: torch.dtype, decay: Tensor, base_2: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The lines of Hugging Face models, from the log decays on, with a triangular solve in float32."""
    repeats, length, per_channel = v.shape[2] // k.shape[2], decay.shape[3], decay.dim() == 5

    def chunked(t: Tensor) -> Tensor:
        return t.transpose(1, 2).float().unflatten(2, (-1, length))

    def rows(x: Tensor) -> Tensor:
        if norm_eps is not None:
            x = x.float()
            x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + norm_eps)
        return chunked(x.repeat_interleave(repeats, dim=2) if repeats > 1 else x)

    keys, values, strength = rows(k), chunked(v), chunked(beta.unsqueeze(-1))
    upper = torch.ones(length, length, dtype=torch.bool, device=k.device).triu(1)
    sums = decay.cumsum(3)
    if per_channel:
        between = (sums.unsqueeze(-2) - sums.unsqueeze(-3)).masked_fill(upper[:, :, None], -math.inf).exp()
    else:
        between = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(upper, -math.inf).exp()

    def products(x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * keys.unsqueeze(-3) * between).sum(-1) if per_channel else (x @ keys.mT) * between

    system = products(keys * strength)
    decayed = (sums if per_channel else sums.unsqueeze(-1)).exp()
    right = (values * strength, keys * strength * decayed)
    found = [torch.linalg.solve_triangular(system, x, upper=False, unitriangular=True) for x in right]
    found += [] if q is None else [products(rows(q) * scale)]
    return tuple(x.to(out_dtype) for x in found)


def _fla(per_channel: bool) -> Call:
    """flash-linear-attention, whose kernels of KDA form the pairs as well; here of k with itself."""
    if per_channel:
        kda = importlib.import_module("fla.ops.kda.chunk_intra").chunk_kda_fwd_intra
    else:
        gdn = importlib.import_module("fla.ops.gated_delta_rule.chunk_fwd").chunk_gated_delta_rule_fwd_intra

    def run(k: Tensor, v: Tensor, sums: Tensor, beta: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        base_2 = rest[-1]
        w, u = (kda(k, k, v, base_2, beta, DIM**-0.5) if per_channel else gdn(k, v, base_2, beta))[:2]
        first, second = (x.unflatten(1, (-1, CHUNK)).movedim(3, 1) for x in (u, w))
        return first, second

    return run
