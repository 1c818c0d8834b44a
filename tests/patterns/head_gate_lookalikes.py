"""What resembles a head gate and must be left alone, each with the reason that has to be given, if any."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.head_gate_cases import COLUMNS, F32, HEADS, TOKENS, Table, entry

LOOKALIKES: Table = {}


def shapes(*wanted: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Any:
    return lambda: tuple(torch.randn(shape).to(dtype) for shape in wanted)


# --- ordinary linear layers, of which nothing is said ---


@entry(LOOKALIKES)
def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@entry(LOOKALIKES)
def linear_and_activation(x: Tensor, weight: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, weight))


@entry(LOOKALIKES, make=shapes((2, TOKENS, COLUMNS), (HEADS, COLUMNS), (HEADS,)))
def linear_with_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias) * 0.5


@entry(LOOKALIKES)
def decay_projection(x: Tensor, weight: Tensor) -> Tensor:
    """The gate of a gated delta rule."""
    return -F.softplus(F.linear(x, weight).float())


@entry(LOOKALIKES, make=shapes((2, TOKENS, COLUMNS), (4, COLUMNS)))
def too_few_heads(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) * 0.5


@entry(LOOKALIKES, make=shapes((2, 150, COLUMNS), (130, COLUMNS)))
def too_many_heads(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) * 0.5


@entry(LOOKALIKES, make=shapes((2, TOKENS, COLUMNS), (2, COLUMNS, HEADS)))
def weights_per_batch(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x, weight) * 0.5


@entry(LOOKALIKES, make=shapes((3, 16, COLUMNS), (3, 16, COLUMNS)))
def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * COLUMNS**-0.5, -1)


@entry(LOOKALIKES, make=lambda: (torch.randn(TOKENS, COLUMNS).double(), torch.randn(HEADS, COLUMNS).double()))
def float64(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) * 0.5


# --- products that come close ---


@entry(LOOKALIKES, "its product (mm) is not scaled: it goes to", weights=F32)
def router(x: Tensor, weight: Tensor) -> Tensor:
    """The logits of a mixture of experts: upcast, but not scaled."""
    return F.linear(x.float(), weight).topk(2).values


@entry(LOOKALIKES, "is not a multiple of it", weights=F32)
def sigmoid_router(x: Tensor, weight: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x.float(), weight)) * 0.5


@entry(LOOKALIKES, "is not scaled by a constant", weights=F32)
def constants_that_cancel(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight) * 4.0 / 4.0


@entry(LOOKALIKES, "is not scaled by a constant", weights=F32, q="bth")
def only_a_tensor_multiplies(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return F.linear(x.float(), weight) * q


@entry(LOOKALIKES, "is not a multiple of it", make=shapes((TOKENS, COLUMNS), (HEADS, COLUMNS)))
def activation_before_the_scaling(x: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(F.linear(x.float(), weight.float())) * 0.5


@entry(LOOKALIKES, "is not a multiple of it", weights=F32)
def clamped(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight).clamp(-1e4, 1e4) * 0.5


@entry(LOOKALIKES, "is not a multiple of it", weights=F32)
def shifted(x: Tensor, weight: Tensor) -> Tensor:
    return (F.linear(x.float(), weight) + 1e-3) * 0.5


@entry(LOOKALIKES, "is not a multiple of it", weights=F32)
def squared(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight).square() * 0.5


@entry(LOOKALIKES, "is not a multiple of it", weights=F32)
def magnitude(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight).abs() * 0.5


@entry(LOOKALIKES, "is not scaled: 4 nodes use it", weights=F32)
def nan_replaced(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nan_to_num(F.linear(x.float(), weight)) * 0.5


@entry(LOOKALIKES, "is not a multiple of it", weights=F32)
def rounded_to_integers(x: Tensor, weight: Tensor) -> Tensor:
    return torch.round(F.linear(x.float(), weight)) * 0.5


@entry(LOOKALIKES, "is not a multiple of it", weights=F32, q="bth")
def divided_by_the_scales(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return F.linear(x.float(), weight) / q * 0.5


@entry(LOOKALIKES, "is not a multiple of it", weights=F32, q="bth")
def added_to_the_scales(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return (F.linear(x.float(), weight) + q) * 0.5


@entry(LOOKALIKES, "meets several tensors", weights=F32, q="bth")
def two_tensors(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return torch.addcmul(F.linear(x.float(), weight), q, q.cumsum(1)) * 0.5


@entry(LOOKALIKES, make=shapes((64, COLUMNS), (1000, COLUMNS)))
def few_tokens_and_many_outputs(x: Tensor, weight: Tensor) -> Tensor:
    """64 tokens are no heads."""
    return F.linear(x, weight) * 0.5


@entry(LOOKALIKES, make=shapes((64, COLUMNS), (1000, COLUMNS)))
def few_tokens_on_the_right(x: Tensor, weight: Tensor) -> Tensor:
    return (weight @ torch.tanh(x).mT) * 0.5


@entry(LOOKALIKES, "which Inductor computes where it is used", weights=F32, q="bth")
def scales_computed_for_it(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return F.linear(x.float(), weight) * torch.sigmoid(q) * 0.5


@entry(LOOKALIKES, make=shapes((2, TOKENS, COLUMNS), (2, COLUMNS, HEADS)))
def upcast_weights_per_batch(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.float(), weight.float()) * 0.5


@entry(LOOKALIKES, "is not scaled: 2 nodes use it", weights=F32)
def product_used_twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    product = F.linear(x.float(), weight)
    return product * 0.5, product.cumsum(1)


@entry(LOOKALIKES, "is not scaled: it is returned", weights=F32, make=shapes((TOKENS, COLUMNS), (HEADS, COLUMNS)))
def product_returned_too(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    product = F.linear(x.float(), weight.float())
    return product * 0.5, product


@entry(LOOKALIKES, "is not scaled: it goes to", weights=F32)
def only_some_heads(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight)[..., 1:] * 0.5


@entry(LOOKALIKES, "is not scaled: it goes to", weights=F32, q="bth")
def broadcast_to_keys(x: Tensor, weight: Tensor, q: Tensor) -> Tensor:
    return F.linear(x.float(), weight).unsqueeze(1) * q.unsqueeze(2) * 0.5


# --- the same function where the kernel cannot take it or does not pay ---


@entry(LOOKALIKES, "its product has 64 columns", make=shapes((2, TOKENS, 64), (HEADS, 64), dtype=F32))
def few_columns(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) * 0.5


@entry(LOOKALIKES, "at 16400 rows stock Inductor is as fast", make=shapes((16400, COLUMNS), (HEADS, COLUMNS)))
def many_rows(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) * 0.5


@entry(LOOKALIKES, "lie 150 elements apart", make=shapes((COLUMNS, 150), (HEADS, COLUMNS)))
def columns_of_x_apart(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.mT, weight) * 0.5


@entry(LOOKALIKES, make=shapes((2, TOKENS, COLUMNS), (HEADS, COLUMNS), dtype=torch.bfloat16))
def inexact_factor_before_a_rounded_product(x: Tensor, weight: Tensor) -> Tensor:
    """0.3 x is rounded to bfloat16: not the same as 0.3 times the product."""
    return F.linear(x * 0.3, weight)
