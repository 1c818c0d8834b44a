"""`mla_kv_pack_kernel` against the formula, on the interpreter; outputs start as NaN, so each must be written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from tests.support.mla_kv_pack import DIVISORS, E4, E5, Arguments, draw, expected, launch, same_bytes

SPLIT, FLAT = "rows=4,warps=1,flat=0", "rows=16,warps=4,flat=1"
SCALE = torch.tensor(2.7)


def check(args: Arguments, launch_with: str = SPLIT, inlined: bool = False) -> None:
    with tuning.overriding(mla_kv_pack=launch_with):
        found = launch(args, inlined=inlined)
    for actual, wanted in zip(found, expected(args), strict=True):
        assert same_bytes(actual, wanted)


@pytest.mark.parametrize("launch_with", [SPLIT, FLAT])
@pytest.mark.parametrize("k_layout, v_layout", [("bthd", "bthd"), ("bhtd", "bthd"), ("bhtd", "bhtd")])
@pytest.mark.parametrize("batch", [1, 3])
def test_layouts(batch: int, k_layout: str, v_layout: str, launch_with: str) -> None:
    form: dict[str, Any] = {"k_layout": k_layout, "v_layout": v_layout}
    for inlined in (False, True):
        check(draw(batch, 5, 3, 32, 16, 32, **form), launch_with, inlined)


@pytest.mark.parametrize("launch_with", [SPLIT, FLAT])
@pytest.mark.parametrize("nope, pe, value", [(128, 64, 128), (192, 64, 256), (96, 40, 72), (8, 8, 8), (1024, 8, 1016)])
def test_widths(nope: int, pe: int, value: int, launch_with: str) -> None:
    fitting = launch_with if nope < 1024 else "rows=2,warps=4" + launch_with[-7:]
    check(draw(1, 3, 2, nope, pe, value), fitting)
    check(draw(1, 3, 2, nope, pe, 0, pe_first=True), fitting)


@pytest.mark.parametrize("heads", [1, 2, 5, 16])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("launch_with", ["rows=1,warps=1,flat=0", SPLIT, FLAT])
def test_heads_and_tokens(heads: int, tokens: int, launch_with: str) -> None:
    check(draw(1, tokens, heads, 16, 8, 16), launch_with)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k_dtype, v_dtype", [(E4, E5), (E5, E4)])
def test_dtypes(dtype: torch.dtype, k_dtype: torch.dtype, v_dtype: torch.dtype) -> None:
    check(draw(1, 4, 3, 24, 8, 16, dtype=dtype, k_dtype=k_dtype, v_dtype=v_dtype, amplitude=300.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_uncast_key(dtype: torch.dtype) -> None:
    check(draw(2, 4, 3, 24, 8, 0, dtype=dtype, k_dtype=dtype, k_layout="bhtd"))


@pytest.mark.parametrize("steps", ["*s", "/s", "*1/s", "*0.3", "*s clamp(-20.0,30.0)", "clamp(-1.5,1e9) /s *-4.0"])
def test_steps(steps: str) -> None:
    scale = SCALE if "s" in steps else None
    args = draw(1, 9, 4, 32, 8, 32, k_steps=steps, v_steps="*0.5", k_scale=scale)
    check(args)
    swapped = dataclasses.replace(args, k_steps="*0.5", k_scale=None, v_steps=steps, v_scale=scale)
    check(swapped, FLAT)


@pytest.mark.parametrize("scale", DIVISORS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_quotients_of_every_bfloat16_number(scale: float) -> None:
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, 64, 4, 256)
    divisor = torch.tensor(scale)
    form: dict[str, Any] = {"k_steps": "/s", "v_steps": "/s", "k_scale": divisor, "v_scale": divisor, "v_dtype": E5}
    check(Arguments(numbers[..., :128], numbers[:, :, 0, :8], numbers[..., 128:], **form), "rows=32,warps=8,flat=1")


def test_scales_of_any_float_dtype_and_shape() -> None:
    scale = torch.full((1, 1, 1), 2.5)
    for k_scale in (scale.bfloat16(), scale.half(), scale[0], torch.tensor([9.0, 2.5])[1]):
        check(draw(1, 3, 2, 16, 8, 16, k_steps="/s", v_steps="*s", k_scale=k_scale, v_scale=scale))


def test_strides() -> None:
    kv = torch.randn(2, 5, 3, 96).bfloat16()
    head_major = kv.transpose(1, 2).contiguous().transpose(1, 2)
    pe = torch.randn(5, 2, 40).bfloat16()[..., 16:24].transpose(0, 1)
    for source in (kv, head_major, kv[:, :, :, 8:]):
        for launch_with in (SPLIT, FLAT):
            check(Arguments(source[..., :32], pe, source[..., 40:72]), launch_with)
            check(Arguments(source[..., :32], pe, source[..., 40:72]), launch_with, inlined=True)
