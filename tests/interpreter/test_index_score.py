"""The kernels of `index_score` against float64, on the interpreter; outputs start as NaN: all must be written."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from tests.support.index_score import E4, Arguments, draw, expected, hidden, launch, relative_error

SMALL = "keys=16,queries=4,columns=16,warps=1,stages=1"
BY_HEAD = "keys=16,queries=16,columns=0,warps=1,stages=1"
KINDS = ("none", "keep", "drop", "add", "causal")
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def check(args: Arguments, *launches: str, inlined: bool = True) -> None:
    for forced in launches or (SMALL, BY_HEAD):
        with tuning.overriding(index_score=forced):
            actual = launch(args, inlined=inlined)
        assert relative_error(actual, expected(args)) < BOUND[args.dtype], forced


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch, queries, keys", [(1, 1, 40), (2, 9, 37), (1, 16, 16), (1, 3, 5)])
def test_masks_and_ragged_sizes(kind: str, batch: int, queries: int, keys: int) -> None:
    for inlined in (False, True):
        check(draw(batch, queries, keys, **hidden(kind, batch, queries, keys)), inlined=inlined)


@pytest.mark.parametrize("offset", [-20, -3, 0, 7, 100])
def test_causal_offsets(offset: int) -> None:
    check(draw(1, 13, 40, mask_kind="causal", causal_offset=offset))


@pytest.mark.parametrize("heads", [1, 5, 8, 12, 16, 24, 64])
@pytest.mark.parametrize("kind", ["none", "add"])
def test_heads(heads: int, kind: str) -> None:
    args = draw(1, 7, 20, heads, **hidden(kind, 1, 7, 20))
    check(args, "keys=16,queries=4,columns=16,warps=2,stages=1")
    check(args, "keys=16,queries=8,columns=64,warps=2,stages=1")


@pytest.mark.parametrize("width", [16, 24, 64, 96, 128, 192])
def test_widths(width: int) -> None:
    check(draw(1, 3, 20, 8, width))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, E4])
@pytest.mark.parametrize("scales", ["", "q", "k", "qk"])
def test_dtypes_and_scales(dtype: torch.dtype, scales: str) -> None:
    check(draw(1, 5, 20, 8, 32, dtype=dtype, scales=scales, w_dtype=torch.bfloat16))


def test_key_scales_after_the_sum() -> None:
    check(draw(1, 5, 20, 8, 32, dtype=E4, scales="qk", scale_after=True))


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "drop"])
def test_result_dtypes(out: torch.dtype, kind: str) -> None:
    check(draw(1, 5, 20, out=out, **hidden(kind, 1, 5, 20)))


@pytest.mark.parametrize("layout", ["bst", "sbt", "bts", "tbs", "stb"])
@pytest.mark.parametrize("kind", ["none", "causal", "keep"])
def test_layouts(layout: str, kind: str) -> None:
    check(draw(2, 5, 20, layout=layout, **hidden(kind, 2, 5, 20)))


def test_fill_values() -> None:
    lowest = torch.finfo(torch.float32).min
    for fill in (lowest, -1e9, 0.0, math.inf, -math.inf):
        check(draw(1, 9, 40, fill=fill, **hidden("keep", 1, 9, 40)))


def test_strides() -> None:
    base = draw(2, 6, 20, 8, 16, **hidden("keep", 2, 6, 20))
    assert base.mask is not None
    wide = {
        "q": torch.nn.functional.pad(base.q, (8, 8))[..., 8:24],
        "k": base.k.transpose(0, 1).contiguous().transpose(0, 1),
        "w": base.w.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "mask": base.mask.mT.contiguous().mT,
    }
    for name, tensor in wide.items():
        changed: Any = {name: tensor}
        check(dataclasses.replace(base, **changed), inlined=name == "q")
    heads_first = base.q.transpose(1, 2).contiguous()
    check(dataclasses.replace(base, q=heads_first.transpose(1, 2), k=base.k[:1].expand(2, -1, -1)))
    check(dataclasses.replace(base, mask=base.mask[:1, :1].expand(2, 6, 20)))


@pytest.mark.parametrize("keep_nan", [True, False])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity(keep_nan: bool) -> None:
    args = draw(1, 6, 20, 5, keep_nan=keep_nan)
    args.q[0, 1, 2, 3] = math.nan
    args.k[0, 4, 5] = math.nan
    check(args)
    args = draw(1, 6, 20, 8)
    args.w[0, 3, 1] = math.inf
    check(args)


def test_a_nan_behind_a_mask_is_hidden() -> None:
    args = draw(1, 6, 40, **hidden("keep", 1, 6, 40))
    assert args.mask is not None
    args.k[0, 33] = math.nan
    args.mask[:, :, 33] = False
    check(args)


def test_a_mask_of_nan_shows() -> None:
    args = draw(1, 6, 40, **hidden("add", 1, 6, 40))
    assert args.mask is not None
    args.mask[0, 0, 35] = math.nan
    check(args)


def test_nothing_is_seen() -> None:
    check(draw(1, 6, 40, mask_kind="keep", mask=torch.zeros(1, 6, 40, dtype=torch.bool)))
    check(draw(1, 6, 40, mask_kind="add", mask=torch.full((1, 6, 40), -math.inf)))
    check(draw(1, 6, 40, mask_kind="causal", causal_offset=-7))
