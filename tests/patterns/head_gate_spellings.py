"""The head weights of an indexer, written as different engineers would write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.head_gate_cases import BF16, COLUMNS, DIM, F16, F32, HEADS, Table, entry

SPELLINGS: Table = {}
BOTH = HEADS**-0.5 * DIM**-0.5


@entry(SPELLINGS, weights=F32)
def hugging_face(x: Tensor, weight: Tensor) -> Tensor:
    """`transformers`: the weights stay in float32."""
    return F.linear(x.to(weight.dtype), weight).float() * (HEADS**-0.5)


@entry(SPELLINGS)
def hugging_face_in_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight).float() * (HEADS**-0.5)


@entry(SPELLINGS, scale=BOTH, weights=F32)
def two_constants(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight).float() * (HEADS**-0.5) * (DIM**-0.5)


@entry(SPELLINGS, scale=BOTH, q="bth1", result="bth1")
def serving_engine(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    weights = F.linear(x, weight) * HEADS**-0.5
    return weights.unsqueeze(-1) * q * DIM**-0.5


@entry(SPELLINGS, scale=BOTH, q="bth1")
def squeezed_again(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return ((F.linear(x, weight).float() * HEADS**-0.5).unsqueeze(-1) * q * DIM**-0.5).squeeze(-1)


@entry(SPELLINGS, scale=BOTH, q="bth", flat=True, result="rh", static=True)
def rows_of_all_batches(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return q.view(-1, HEADS) * (x @ weight.t()) * BOTH


@entry(SPELLINGS, scale=1 / math.sqrt(HEADS), dtype=BF16)
def divided_by_a_root(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) / math.sqrt(HEADS)


@entry(SPELLINGS, scale=BOTH, weights=F32)
def divided_twice(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() @ weight.mT) / HEADS**0.5 / DIM**0.5


@entry(SPELLINGS, weights=F32)
def einsum(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("btd,hd->bth", x.float(), weight) * HEADS**-0.5


@entry(SPELLINGS, dtype=BF16)
def einsum_in_bfloat16(x: Tensor, weight: Tensor) -> Tensor:
    return HEADS**-0.5 * torch.einsum("bsd,hd->bsh", x, weight)


@entry(SPELLINGS, scale=0.3, weights=F32, flat=True, result="rh")
def einsum_of_rows(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("td,hd->th", x.float(), weight).mul(0.3)


@entry(SPELLINGS, scale=0.5)
def both_upcast(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float()) * 0.5


@entry(SPELLINGS, scale=0.5, weights=F32)
def upcast_after_a_view(x: Tensor, weight: Tensor) -> Tensor:
    return (x.view(-1, COLUMNS).float() @ weight.t()).view(*x.shape[:2], HEADS) * 0.5


@entry(SPELLINGS, scale=0.5, weights=F32, flat=True, result="rh")
def transposed_weights_copied(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x.float(), weight.t().contiguous()) * 0.5


@entry(SPELLINGS, scale=0.25, dtype=BF16)
def batched(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x, weight.t().expand(x.shape[0], -1, -1)) * 0.25


@entry(SPELLINGS, scale=0.25, dtype=BF16)
def weights_unsqueezed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(x, weight.unsqueeze(0).transpose(1, 2)) * 0.25


@entry(SPELLINGS, scale=0.25, dtype=BF16, result="bht")
def heads_first(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(weight, x.transpose(1, 2)) * 0.25


@entry(SPELLINGS, scale=0.25, weights=F32)
def heads_first_and_back(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(weight, x.float().mT).mT * 0.25


@entry(SPELLINGS, scale=0.25, q="bth", result="bht")
def heads_first_with_scales(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return torch.matmul(weight, x.mT) * (0.25 * q.mT)


@entry(SPELLINGS, scale=0.125, dtype=BF16)
def scaled_before_the_product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x * 0.125, weight)


@entry(SPELLINGS, scale=BOTH, weights=F32)
def scaled_in_float32_before_the_product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float() * HEADS**-0.5, weight) * DIM**-0.5


@entry(SPELLINGS, scale=BOTH, weights=F32)
def weights_scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x.float() @ (weight / HEADS**0.5 / DIM**0.5).t()


@entry(SPELLINGS, scale=-2.0)
def negated(x: Tensor, weight: Tensor) -> Tensor:
    return -(F.linear(x, weight).float() * 2)


@entry(SPELLINGS, scale=BOTH)
def constant_tensor(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight).float() * torch.full((1,), BOTH)


@entry(SPELLINGS, scale=3.0)
def sum_of_multiples(x: Tensor, weight: Tensor) -> Tensor:
    return torch.lerp(torch.zeros(1), F.linear(x, weight).float(), 3.0)


@entry(SPELLINGS, scale=0.3, q="bt1")
def scale_per_row(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return F.linear(x, weight).float() * 0.3 * q


@entry(SPELLINGS, scale=0.3, q="h")
def scale_per_head(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return 0.3 * (F.linear(x, weight).float() * q)


@entry(SPELLINGS, scale=0.3, q="bth", q_dtype=BF16, dtype=BF16)
def scales_in_bfloat16(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return (F.linear(x, weight) * q) * 0.3


@entry(SPELLINGS, scale=0.3, q="bth", q_dtype=F16, weights=F32)
def scales_in_float16(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return (q.float() * 0.3) * F.linear(x.float(), weight)


@entry(SPELLINGS, scale=0.3, weights=F16, rows=F16)
def float16(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight).float() * 0.3


@entry(SPELLINGS, scale=0.3, weights=F32, rows=F32)
def float32(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) * 0.3


@entry(SPELLINGS, scale=0.3, weights=F32, dtype=BF16)
def rounded_at_the_end(x: Tensor, weight: Tensor) -> Tensor:
    return (F.linear(x.float(), weight) * 0.3).to(x.dtype)


@entry(SPELLINGS, scale=0.3, dtype=F32)
def rounded_in_between(x: Tensor, weight: Tensor) -> Tensor:
    return (F.linear(x, weight) * 0.3).float()


@entry(SPELLINGS, scale=0.3, batch=1, tokens=1, weights=F32)
def one_row(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight) * 0.3


@entry(SPELLINGS, scale=0.3, batch=1, result="th")
def single_batch_squeezed(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.squeeze(0), weight).float() * 0.3


@entry(SPELLINGS, scale=0.3, result="b1th")
def an_axis_for_the_queries(x: Tensor, weight: Tensor) -> Tensor:
    return (F.linear(x, weight).float() * 0.3).view(x.shape[0], 1, -1, HEADS) * 1.0


@entry(SPELLINGS, scale=0.3, result="rh")
def columns_of_a_wider_tensor(x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.cat([x, x * 2], -1)
    return F.linear(wide[..., :COLUMNS], weight).float().flatten(0, 1) * 0.3


@entry(SPELLINGS, scale=0.3, weights=F32)
def weights_transposed_first(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tensordot(x.float(), weight, dims=([2], [1])) * 0.3


@entry(SPELLINGS, scale=0.3, batch=1, tokens=11, flat=True, result="hr")
def weights_on_the_left(x: Tensor, weight: Tensor) -> Tensor:
    return (weight @ torch.where(x > 0, x, x).mT).float() * 0.3
