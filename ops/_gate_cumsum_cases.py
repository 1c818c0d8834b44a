"""What `gate_cumsum` is benchmarked on: shapes of released models, a model's own spelling, and peers."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch

from fusion_passes.benchmarking import Call, Case
from fusion_passes.ops.gate_cumsum import OP, reference

Tensor = torch.Tensor

CHUNK = 64


def cases() -> list[Case]:
    """Kimi Linear (KDA) and Gated DeltaNet (GDN) heads, whole and split over four GPUs, with their cost.

    Bytes: raw read once, sums written once. FLOPs: about 20 per element, all but two of them float32 FMAs or the like.
    """
    shapes = [(32, 128, t) for t in (128, 512, 2048, 4096, 16384)] + [(8, 128, 4096)]
    shapes += [(32, 1, t) for t in (512, 4096, 16384)] + [(8, 1, 4096)]
    return [_case(*shape, layout) for shape in shapes for layout in ("bhnck", "bnchk")]


def _case(heads: int, channels: int, tokens: int, layout: str) -> Case:
    elements = heads * channels * tokens
    kind = "KDA" if channels > 1 else "GDN"
    return Case(
        f"{kind} {heads}x{channels} T={tokens} {layout}",
        OP,
        functools.partial(_arguments, heads, channels, tokens, layout),
        bytes=6 * elements,
        flops=20 * elements,
        reference=reference,
        plain=plain,
        peers={"fla": functools.partial(_fla, kind)} if layout == "bnchk" else {},
    )


def _arguments(
    heads: int, channels: int, tokens: int, layout: str, device: torch.device, generator: torch.Generator
) -> tuple[Any, ...]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    raw = draw(1, tokens, 1, heads, channels).mul_(4).to(torch.bfloat16)
    a_log = draw(1, heads, 1).sigmoid_().mul_(16).log_().expand(1, heads, channels)
    chunks = math.ceil(tokens / CHUNK)
    return raw, a_log, draw(1, heads, channels), chunks, CHUNK, None, 1.0, 1.0, 20.0, False, layout, None, None


def plain(
    raw: Tensor, a_log: Tensor, bias: Tensor, chunks: int, chunk_size: int, lower_bound: None, scale: float,
    beta: float, threshold: float, pad_gate: bool, layout: str, *packing: None,
) -> Tensor:  # fmt: skip
    """A model's own spelling of these cases: whole chunks, the softplus gate with its defaults."""
    batch, _, _, heads, channels = raw.shape
    gate = -a_log[..., :1].float().exp() * torch.nn.functional.softplus(raw.float() + bias)
    gate = gate.view(batch, chunks, chunk_size, heads, channels)
    if layout == "bhnck":
        return gate.permute(0, 3, 1, 2, 4).contiguous().cumsum(3)
    return gate.cumsum(2)


def _fla(kind: str) -> Call:
    """The gate kernels of flash-linear-attention, which are token-major."""
    if kind == "KDA":
        kda = importlib.import_module("fla.ops.kda.gate").kda_gate_chunk_cumsum
        return lambda raw, a, bias, *_: kda(raw.squeeze(2), a[0, :, 0], chunk_size=CHUNK, dt_bias=bias.flatten())
    gdn = importlib.import_module("fla.ops.gated_delta_rule.gate").gdn_gate_chunk_cumsum
    return lambda raw, a, bias, *_: gdn(
        raw.squeeze(2).squeeze(-1), a[0, :, 0], chunk_size=CHUNK, dt_bias=bias.flatten()
    )
