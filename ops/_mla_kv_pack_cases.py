"""What `mla_kv_pack` is benchmarked on: DeepSeek-V3 heads, whole and split over eight GPUs, one token to 16384."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from fusion_passes.benchmarking import Call, Case
from fusion_passes.ops.mla_kv_pack import OP, reference

Tensor = torch.Tensor

NOPE, PE, V = 128, 64, 128
FLOAT8 = torch.float8_e4m3fn
SCALES = (1.7, 0.6)


def cases() -> list[Case]:
    """bfloat16 to e4m3fn, cast alone or times one scale each for key and value.

    Bytes: k_nope, v and k_pe read once, K and V written once. FLOPs: one per element where there is a scale.
    """
    cast = [(heads, tokens) for heads in (16, 128) for tokens in (1, 8, 128, 2048, 16384)]
    scaled = [(16, 8), (16, 2048), (128, 128), (128, 16384)]
    return [_case(*shape, False) for shape in cast] + [_case(*shape, True) for shape in scaled]


def _case(heads: int, tokens: int, scaled: bool) -> Case:
    pairs = heads * tokens
    return Case(
        f"{heads} heads x {tokens} tokens {'scaled' if scaled else 'cast'}",
        OP,
        functools.partial(_arguments, heads, tokens, scaled),
        bytes=2 * (pairs * (NOPE + V) + tokens * PE) + pairs * (NOPE + PE + V),
        flops=pairs * (NOPE + PE + V) * scaled,
        reference=reference,
        plain=plain,
        peers={"sglang": _sglang},
    )


def _arguments(
    heads: int, tokens: int, scaled: bool, device: torch.device, generator: torch.Generator
) -> tuple[Any, ...]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    kv = draw(1, tokens, heads, NOPE + V).to(torch.bfloat16)
    k_pe = draw(1, tokens, PE).to(torch.bfloat16)
    scales = (*(torch.tensor(scale, device=device) for scale in SCALES),) if scaled else (None, None)
    steps = "*s" if scaled else ""
    return kv[..., :NOPE], k_pe, kv[..., NOPE:], *scales, steps, FLOAT8, "bthd", False, steps, FLOAT8, "bthd"


def _sglang() -> Call:
    """SGLang's kernel, with scales as numbers: it multiplies both always."""
    module = importlib.import_module("sglang.kernels.ops.attention.mla_kv_pack_quantize_fp8")

    def call(k_nope: Tensor, k_pe: Tensor, v: Tensor, k_scale: Tensor | None, *form: Any) -> Any:
        scales = (1.0, 1.0) if k_scale is None else SCALES
        return module.mla_kv_pack_quantize_fp8(k_nope[0], k_pe[0], v[0], *scales)

    return call


def plain(
    k_nope: Tensor, k_pe: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, *form: Any
) -> tuple[Tensor, Tensor]:
    """The spelling of a serving engine: an empty key, two assignments, scales in float32, casts."""
    k = k_nope.new_empty(*k_nope.shape[:3], NOPE + PE)
    k[..., :NOPE] = k_nope
    k[..., NOPE:] = k_pe[:, :, None]
    if k_scale is not None and v_scale is not None:
        return (k.float() * k_scale).to(FLOAT8), (v.float() * v_scale).to(FLOAT8)
    return k.to(FLOAT8), v.to(FLOAT8)
