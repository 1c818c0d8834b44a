"""Gates that are summed up by a product with a triangle of ones, and products that sum up something else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.gate_cumsum_cases import Case, Table, entry
from tests.patterns.gate_cumsum_channel import BF16, LOG2E, chunked, heads
from tests.patterns.gate_cumsum_head import head_case, per_head
from tests.patterns.gate_cumsum_lookalikes import gate

PRODUCTS: Table = {}
OTHER_PRODUCTS: Table = {}


@entry(PRODUCTS, Case())
def triangular_matmul(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The triangle from the left."""
    return torch.ones(64, 64).tril() @ chunked(gate(raw, A_log, bias))


@entry(PRODUCTS, Case(out="bnchk", dtype=BF16))
def triangular_einsum(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Tokens before heads; the triangle is a causal mask."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw.float() + bias))
    triangle = torch.ones(64, 64, dtype=torch.bool).tril().float()
    return torch.einsum("ij,bnjhk->bnihk", triangle, g.unflatten(1, (-1, 64)))


@entry(PRODUCTS, head_case())
def compared_positions_from_the_right(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """One gate per head; the triangle is a comparison of positions, on the right."""
    at = torch.arange(64)
    return per_head(-A_log.exp() * F.softplus(raw + bias)) @ (at[:, None] <= at).float()


@entry(PRODUCTS, head_case(scale=LOG2E))
def triangle_of_another_number(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The step to base 2 is in the triangle."""
    triangle = torch.full((64, 64), LOG2E).triu()
    return torch.matmul(per_head(-A_log.exp() * F.softplus(raw + bias)), triangle)


@entry(PRODUCTS, head_case(out="xc", batch=1, heads=4))
def one_product_of_all_rows(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Heads and chunks are rows of one matrix."""
    g = per_head(-A_log.exp() * F.softplus(raw + bias)).reshape(-1, 64)
    return g @ torch.ones(64, 64).triu()


def _product(raw: Tensor, A_log: Tensor, bias: Tensor, triangle: Tensor) -> Tensor:
    return triangle @ chunked(gate(raw, A_log, bias))


@entry(OTHER_PRODUCTS, Case(), "value")
def without_its_own_position(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """Strictly below the diagonal."""
    return _product(raw, A_log, bias, torch.ones(64, 64).tril(-1))


@entry(OTHER_PRODUCTS, Case(), "value")
def with_the_next_position(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """One diagonal more."""
    return _product(raw, A_log, bias, torch.ones(64, 64).tril(1))


@entry(OTHER_PRODUCTS, Case(), "value")
def of_later_positions(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The upper triangle from the left: a reversed cumsum."""
    return _product(raw, A_log, bias, torch.ones(64, 64).triu())


@entry(OTHER_PRODUCTS, Case(), "value")
def of_the_last_positions(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """A band: a sliding window of 32."""
    return _product(raw, A_log, bias, torch.ones(64, 64).tril().triu(-31))


@entry(OTHER_PRODUCTS, Case(), "value")
def with_one_number_off(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The last position counts twice."""
    at = torch.arange(64)
    twice = torch.where((at[:, None] == 63) & (at == 63), 2.0, 1.0)
    return _product(raw, A_log, bias, torch.ones(64, 64).tril() * twice)


@entry(OTHER_PRODUCTS, Case(), "value")
def another_triangle_for_every_chunk(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The n-th chunk's triangle is n + 1."""
    count = torch.arange(1, raw.shape[1] // 64 + 1).float()
    return _product(raw, A_log, bias, torch.ones(64, 64).tril() * count.view(1, 1, -1, 1, 1))


@entry(OTHER_PRODUCTS, Case(dtype=BF16), "dtype")
def sums_in_bfloat16(raw: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """The gate and its sums are rounded."""
    g = -A_log.exp()[:, None] * F.softplus(heads(raw.float() + bias))
    return torch.ones(64, 64, dtype=BF16).tril() @ chunked(g.bfloat16())
