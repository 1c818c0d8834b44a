"""Keys, windows, copies and selections that are left alone, and what helps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.patterns import mla_kv_pack_lookalikes as mla
from tests.patterns import qkv_split_lookalikes as qkv
from tests.patterns.hints_cases import BF16, E4, F64, STATIC, Call, Table, draw, entry, marked

CASES: Table = {}
case = functools.partial(entry, CASES)

# --- mla_kv_pack -----------------------------------------------------------------------------------------------------

PACKED = mla.with_scale(1)


def cast(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> Tensor:
    return (mla.key(x, w, pe) * scale).to(E4)


def uneven(width: int) -> Callable[..., Tensor]:
    def pack(nope: Tensor, pe: Tensor) -> Tensor:
        return torch.cat([nope, pe[:, None].expand(-1, 4, -1)], -1).to(E4)

    return pack


KEY = Call(cast, PACKED)

case(
    "mla_kv_pack: scale per channel",
    Call(cast, mla.with_scale(mla.TOTAL)),
    "one scale for the whole tensor", "quantize the whole tensor with one scale", KEY,
)  # fmt: skip
case(
    "mla_kv_pack: steps of the parts",
    Call(lambda x, w, pe, s: torch.cat([mla.project(x, w)[0] * s, mla.shared(pe)], -1).to(E4), PACKED),
    "different steps before the cast", "the whole key, after its parts are put together", KEY,
)  # fmt: skip
case(
    "mla_kv_pack: two scales",
    Call(lambda x, w, pe, s: (mla.key(x, w, pe).float() * s * s.exp()).to(E4), PACKED),
    "one scale, number and clamp", "multiply factors with each other", KEY,
)  # fmt: skip
case(
    "mla_kv_pack: arithmetic",
    Call(lambda x, w, pe, s: (mla.key(x, w, pe).double() * s).to(E4), PACKED),
    "computed in float64", "compute it in bfloat16, float16 or float32", KEY,
)  # fmt: skip
case(
    "mla_kv_pack: dtypes of the parts",
    Call(lambda x, w, pe, wide: torch.cat([mla.project(x, w)[0].float(), mla.shared(wide)], -1).to(E4),
         mla.with_scale(mla.TOKENS, mla.PE)),
    "different dtypes: bfloat16, float32", "hand both parts alike over in bfloat16, float16 or float32:", KEY,
)  # fmt: skip
case(
    "mla_kv_pack: width",
    Call(uneven(12), draw((6, 4, 12), (6, 8), dtype=BF16)),
    "k_nope has 12 columns", "pad k_nope with zeros to 16 columns",
    Call(uneven(16), draw((6, 4, 16), (6, 8), dtype=BF16)),
)  # fmt: skip
case(
    "mla_kv_pack: columns apart",
    Call(lambda nope, pe: uneven(16)(nope.mT, pe), draw((6, 16, 4), (6, 8), dtype=BF16)),
    "lie 4 elements apart", "lay out k_nope with neighbouring columns next to each other",
    Call(uneven(16), draw((6, 4, 16), (6, 8), dtype=BF16)),
)  # fmt: skip
case(
    "mla_kv_pack: symbolic heads",
    Call(lambda nope, pe: torch.cat([nope, pe[:, None].expand(-1, nope.shape[1], -1)], -1).to(E4),
         lambda: (*marked(draw((6, 4, 16), dtype=BF16), 1)(), torch.randn(6, 8).to(BF16))),
    "number of heads is symbolic", STATIC, Call(uneven(16), draw((6, 4, 16), (6, 8), dtype=BF16)),
)  # fmt: skip

# --- qkv_split -------------------------------------------------------------------------------------------------------


def per_head(width: int, order: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda x: tuple(order(p.unflatten(-1, (2, width))).contiguous() for p in x.chunk(2, dim=-1))


def halves(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in x.chunk(2, dim=-1))


def turned(part: Tensor) -> Tensor:
    return part.transpose(1, 2)


case(
    "qkv_split: width",
    Call(per_head(12, turned), draw((2, 4, 48))),
    "runs of 12 channels", "pad every head, by rows of the weight, with zeros to 16 channels",
    Call(per_head(16, turned), draw((2, 4, 64))),
)  # fmt: skip
case(
    "qkv_split: gap",
    Call(lambda x: (x[..., :16].contiguous(), x[..., 24:40].contiguous()), draw((2, 4, 48))),
    "leave gaps", "order the rows of the weight", Call(lambda x: halves(x[..., :32]), draw((2, 4, 48))),
)  # fmt: skip
case(
    "qkv_split: orders",
    Call(qkv.mixed_orders, qkv.LOOKALIKES["mixed_orders"].inputs),
    "some windows have their heads before", "with batch, tokens and heads in the same order",
    Call(per_head(16, turned), draw((2, 4, 64))),
)  # fmt: skip
case(
    "qkv_split: batch and heads",
    Call(qkv.heads_outermost_once, qkv.LOOKALIKES["heads_outermost_once"].inputs),
    "heads before the batch", "with batch, tokens and heads in the same order",
    Call(per_head(16, lambda p: p.permute(2, 0, 1, 3)), draw((1, 4, 64))),
)  # fmt: skip
case(
    "qkv_split: channels apart",
    Call(qkv.every_fourth_channel, qkv.LOOKALIKES["every_fourth_channel"].inputs),
    "neither neighbouring channels nor neighbouring tokens", "next to each other in memory", None,
)  # fmt: skip
case(
    "qkv_split: reader of strides",
    Call(qkv.read_by_an_op_that_takes_strides, qkv.LOOKALIKES["read_by_an_op_that_takes_strides"].inputs),
    "takes strides", "leave out the .contiguous() before it; the setting always_profitable", None,
)  # fmt: skip
case(
    "qkv_split: symbolic columns",
    Call(halves, marked(draw((2, 4, 48)), 2)),
    "for some sizes only", STATIC, Call(halves, draw((2, 4, 48)), {"dynamic": False}),
)  # fmt: skip
case(
    "qkv_split: dtype",
    Call(halves, draw((2, 4, 48), dtype=F64)),
    "x is float64", "hand x over in", Call(halves, draw((2, 4, 48))),
)  # fmt: skip

# --- copies and selections -------------------------------------------------------------------------------------------


def joined(x: Tensor) -> Tensor:
    return torch.cat(x.split(8, dim=-1), dim=-1)


def with_joined(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, joined(x)


def hidden(scores: Tensor, value: Any) -> Tensor:
    chosen = scores.topk(16).indices
    return torch.zeros_like(scores).scatter(-1, chosen, value)


case(
    "redundant_copy: returned",
    Call(joined, draw((16, 16))),
    "would share memory with an input", "do not return it: it has the values of the input",
    Call(lambda x: joined(x).sin(), draw((16, 16))),
)  # fmt: skip
case(
    "redundant_copy: two results",
    Call(lambda x: with_joined(x @ x), draw((16, 16))),
    "would share memory with another result", "return only one of the two",
    Call(lambda x: joined(x @ x), draw((16, 16))),
)  # fmt: skip
case(
    "full_topk: a tensor of one value",
    Call(lambda scores: hidden(scores, torch.ones_like(scores)), draw((4, 16))),
    "for which their order matters", "write a number", Call(lambda scores: hidden(scores, 1.0), draw((4, 16))),
)  # fmt: skip
case(
    "full_topk: order",
    Call(lambda scores: scores.gather(-1, scores.topk(16).indices), draw((4, 16))),
    "for which their order matters", "", None,
)  # fmt: skip

# --- a part of the entries -------------------------------------------------------------------------------------------

ANYWAY = {"always_profitable": True}


def shown(scores: Tensor, axis: int = -1) -> Tensor:
    chosen = scores.topk(5, dim=axis).indices
    return torch.zeros(scores.shape).scatter(axis, chosen, 1.0)


case(
    "topk_mask: another axis",
    Call(lambda scores: shown(scores, 0), draw((16, 16)), ANYWAY),
    "it selects along axis 0 of 2", "move the axis of the selection to the end",
    Call(lambda scores: shown(scores.mT.contiguous().sin()).mT, draw((16, 16)), ANYWAY),
)  # fmt: skip
case(
    "topk_mask: double",
    Call(shown, draw((4, 16), dtype=F64), ANYWAY),
    "scores is float64", "hand scores over in bfloat16, float16 or float32",
    Call(lambda scores: shown(scores.float()), draw((4, 16), dtype=F64), ANYWAY),
)  # fmt: skip
case(
    "topk_mask: columns apart",
    Call(lambda scores: shown(scores[:, ::2]), draw((4, 16)), ANYWAY),
    "reads rows of neighbouring entries", "by .contiguous() before the call",
    Call(lambda scores: shown(scores[:, ::2].contiguous()), draw((4, 16)), ANYWAY),
)  # fmt: skip
case(
    "topk_mask: rows at three strides",
    Call(lambda scores: shown(scores[:, :2, :3]), draw((3, 4, 5, 16)), ANYWAY),
    "lie at more than two strides", "by .contiguous() before the selection",
    Call(lambda scores: shown(scores[:, :2, :3].contiguous()), draw((3, 4, 5, 16)), ANYWAY),
)  # fmt: skip
case(
    "topk_mask: short rows",
    Call(shown, draw((4, 16))),
    "rows of 1,024 to 32,768 entries are measured to gain", "always_profitable", Call(shown, draw((4, 16)), ANYWAY),
)  # fmt: skip
case(
    "topk_mask: long rows",
    Call(shown, draw((1, 32769)), ANYWAY), "rows of 1,024 to 32,768 entries are measured to gain", "", None,
)  # fmt: skip
