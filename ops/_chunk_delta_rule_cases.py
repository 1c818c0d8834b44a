"""What `chunk_delta_rule` is benchmarked on: shapes of released models, their own spelling, and flash-linear-attention.

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
from fusion_passes.ops.chunk_delta_rule import OP, log_decay, reference

Tensor = torch.Tensor

DIM = 128
EPS = 1e-6
# flash-linear-attention is at 5e-3 on the same data; the plain spelling, in float32, at 2e-3.
BOUND = 6e-3
# Compiled by stock, the plain spelling takes minutes to compile for more tokens.
MOST_PLAIN_TOKENS = 512


def cases() -> list[Case]:
    """Qwen3-Next (GDN) and Kimi Linear (KDA) layers, whole and split over four GPUs, with gate, norms and sigmoid.

    Bytes: inputs read once and outputs written once. FLOPs: per token and value head the state is read, written and
    queried once and each chunk of 64 has its triangles of pairs, 2 K V each for three products and 64 (2 K + V).
    """
    shapes = [(False, 16, 32, t) for t in (512, 4096, 16384)] + [(False, 4, 8, t) for t in (4096, 16384)]
    shapes += [(True, 32, 32, t) for t in (512, 4096, 16384)] + [(True, 8, 8, t) for t in (4096, 16384)]
    found = [_case(*shape, strong=False) for shape in shapes]
    return [*found, _case(False, 16, 32, 4096, strong=True), _case(True, 32, 32, 4096, strong=True)]


def _case(per_channel: bool, key_heads: int, heads: int, tokens: int, *, strong: bool) -> Case:
    gates = heads * (DIM if per_channel else 1)
    per_token = 2 * (2 * key_heads * DIM + 2 * heads * DIM + gates + heads)
    kind = "KDA" if per_channel else "GDN"
    return Case(
        f"{kind} {key_heads}/{heads}x{DIM} T={tokens}{' strong decay' if strong else ''}",
        OP,
        functools.partial(_arguments, per_channel, key_heads, heads, tokens, strong),
        bytes=per_token * tokens,
        flops=tokens * heads * (3 * 2 * DIM * DIM + 64 * 3 * DIM),
        reference=reference,
        plain=functools.partial(_plain, kind) if tokens <= MOST_PLAIN_TOKENS else None,
        peers={"fla": functools.partial(_fla, kind)},
        bound=BOUND,
    )


def _arguments(
    per_channel: bool, key_heads: int, heads: int, tokens: int, strong: bool, device: torch.device,
    generator: torch.Generator,
) -> tuple[Any, ...]:  # fmt: skip
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    shape = (heads, DIM) if per_channel else (heads,)
    step = torch.exp(uniform(*shape) * math.log(100.0)) * 1e-3 * (50.0 if strong else 1.0)
    bias = step + torch.log(-torch.expm1(-step))  # softplus(bias) = step
    rows = [normal(1, tokens, h, DIM).bfloat16() for h in (key_heads, key_heads, heads)]
    gate = (0.2 * normal(1, tokens, *shape)).bfloat16()
    a_log = torch.log(1 + 15 * uniform(heads))
    beta = normal(1, tokens, heads).bfloat16()
    return (*rows, gate, beta, a_log, bias, None, None, DIM**-0.5, EPS, "softplus", 0.0, 1.0, torch.bfloat16, True)


def _gates(q: Tensor, g: Tensor, beta: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The log decay in float32 and beta as models hand them to their delta rule."""
    return log_decay(g.float(), a_log, dt_bias, "softplus", 0.0), torch.sigmoid(beta)


def _plain(
    kind: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, a_log: Tensor, dt_bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """The functions of Hugging Face models."""
    # Import statements: Dynamo follows them, and would break the graph at `importlib`.
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    decay, strength = _gates(q, g, beta, a_log, dt_bias)
    repeats = v.shape[2] // k.shape[2]
    if repeats > 1:
        q, k = (x.repeat_interleave(repeats, dim=2) for x in (q, k))
    function = chunk_kimi_delta_attention if kind == "KDA" else torch_chunk_gated_delta_rule
    return function(q, k, v, decay, strength, output_final_state=True, use_qk_l2norm_in_kernel=True)


def _fla(kind: str) -> Call:
    """flash-linear-attention, with everything in its kernels that it takes into them."""
    if kind == "KDA":
        kda = importlib.import_module("fla.ops.kda").chunk_kda
        return lambda q, k, v, g, beta, a_log, dt_bias, *_: kda(
            q, k, v, g, beta, A_log=a_log, dt_bias=dt_bias.flatten(), output_final_state=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        )  # fmt: skip
    gdn = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    return lambda q, k, v, g, beta, a_log, dt_bias, *_: gdn(
        q, k, v, g, beta, A_log=a_log, dt_bias=dt_bias, output_final_state=True,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
    )  # fmt: skip
