"""Spellings of the index score, as different engineers would write them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tests.patterns.index_score_cases import B, D, H, S, T, Table, entry, qkw

SPELLINGS: Table = {}

INF = math.inf


def causal(queries: int = S, keys: int = T) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def with_mask(kind: str = "bool", *batch: int) -> Callable[[], tuple[Tensor, ...]]:
    """q, k, w and a mask with a hole in it: bits that show keys, or a summand."""

    def make() -> tuple[Tensor, ...]:
        seen = causal().expand(*batch, S, T).clone()
        seen[..., 2, 1] = False
        mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -INF)
        return (*qkw(*batch)(), mask)

    return make


def float8(scale: str = "k") -> Callable[[], tuple[Tensor, ...]]:
    """q and k in float8, w, and the scales of their rows."""

    def make() -> tuple[Tensor, ...]:
        q, k, w = qkw()()
        scales = {"k": torch.rand(T, 1) + 0.5, "q": torch.rand(S, H, 1) + 0.5}
        return q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn), w, *(scales[name] for name in scale)

    return make


@entry(SPELLINGS, with_mask("bool", B))
def hugging_face(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """Upcasts, a scale before the relu, the weights as a row of a product, masked_fill."""
    scores = torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)) * D**-0.5
    scores = functional.relu(scores)
    scores = torch.matmul(w.unsqueeze(-2), scores).squeeze(-2)
    return scores.masked_fill(~mask, -INF).topk(4, dim=-1).values


@entry(SPELLINGS, with_mask("sum", B))
def hugging_face_with_a_summand(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """The mask is added."""
    scores = torch.relu(torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)))
    return (torch.matmul((w * D**-0.5).unsqueeze(-2), scores).squeeze(-2) + mask).topk(4, dim=-1).values


@entry(SPELLINGS, with_mask())
def reference_of_a_kernel(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """Heads first, the weights transposed and broadcast, summed over the first axis."""
    score = torch.einsum("mhd,nd->hmn", q.float(), k.float())
    logits = (score.relu() * w.unsqueeze(-1).transpose(0, 1)).sum(dim=0)
    return logits.masked_fill(~mask, float("-inf")).topk(3).values


@entry(SPELLINGS)
def two_einsums(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("sht,sh->st", torch.einsum("shd,td->sht", q.float(), k.float()).relu(), w).topk(3).values


@entry(SPELLINGS, qkw(B))
def two_einsums_with_batches(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.einsum("bshd,btd->bhst", q.float(), k.float()).clamp_min(0)
    return torch.einsum("bhst,bsh->bst", scores, w).topk(3).values


@entry(SPELLINGS, qkw(B))
def einsum_and_sum(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.einsum("bshd,btd->bsth", q.float(), k.float())
    return (functional.relu(scores) * w[:, :, None]).sum(-1).topk(3).values


@entry(SPELLINGS)
def clamp(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return ((q.float() @ k.float().T).clamp(min=0.0) * w[..., None]).sum(1).topk(3).values


@entry(SPELLINGS)
def maximum(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = q.float() @ k.float().T
    return (w.unsqueeze(2) * torch.maximum(scores, torch.zeros_like(scores))).sum(dim=1).topk(3).values


@entry(SPELLINGS)
def where_positive(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = q.float() @ k.float().T
    return (torch.where(scores > 0, scores, 0.0) * w[..., None]).sum(1).topk(3).values


@entry(SPELLINGS)
def threshold(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = functional.threshold(q.float() @ k.float().T, 0.0, 0.0)
    return (scores * w[..., None]).sum(1).topk(3).values


@entry(SPELLINGS)
def where_positive_without_a_selection(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = q.float() @ k.float().T
    return (torch.where(scores > 0, scores, 0.0) * w[..., None]).sum(1)


@entry(SPELLINGS)
def negated_minimum(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = -(-(q.float() @ k.float().T)).clamp(max=0)
    return (scores * w[..., None]).sum(1).topk(3).values


@entry(SPELLINGS)
def loop_over_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    total = torch.zeros(S, T)
    for head in range(H):
        total = total + w[:, head, None] * functional.relu(q[:, head].float() @ k.float().T)
    return total.topk(3).values


@entry(SPELLINGS)
def loop_in_place(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    total = q.new_zeros(S, T, dtype=torch.float32)
    for query, weight in zip(q.unbind(1), w.unbind(1)):
        total += (query.float() @ k.float().mT).relu_() * weight.unsqueeze(-1)
    return total.topk(3).values


@entry(SPELLINGS)
def stacked_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    heads = [(q[:, h].float() @ k.float().T).relu() * w[:, h : h + 1] for h in range(H)]
    return torch.stack(heads).sum(0).topk(3).values


@entry(SPELLINGS)
def groups_of_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Half of the heads at a time, to save memory."""
    total = torch.zeros(S, T)
    for queries, weights in zip(q.split(4, dim=1), w.split(4, dim=1)):
        total += torch.einsum("sht,sh->st", torch.relu(queries.float() @ k.float().T), weights)
    return total.topk(3).values


@entry(SPELLINGS)
def weights_as_a_column(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.relu(torch.einsum("td,shd->sth", k.float(), q.float()))
    return torch.bmm(scores, w.unsqueeze(-1)).squeeze(-1).topk(3).values


@entry(SPELLINGS)
def keys_first(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """The score has keys as rows; its transpose is selected from."""
    scores = torch.relu(torch.einsum("td,shd->tsh", k.float(), q.float()))
    return (scores * w).sum(-1).t().topk(3).values


@entry(SPELLINGS, qkw(dtype=torch.bfloat16))
def all_in_bfloat16(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = functional.relu(torch.einsum("shd,td->sht", q, k))
    return (scores * w.bfloat16()[..., None]).sum(1).topk(3).values


@entry(SPELLINGS, qkw(dtype=torch.float16))
def half_precision_products(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("sht,sh->st", functional.relu(torch.einsum("shd,td->sht", q, k)).float(), w).topk(3).values


@entry(SPELLINGS, qkw(dtype=torch.float32))
def single_precision(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (torch.relu(q @ k.T) * w[..., None]).sum(1).topk(3).values


@entry(SPELLINGS, qkw(dtype=torch.float32))
def mixed_precision(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Keys from a bfloat16 cache, queries in float32: no common narrow dtype."""
    return (torch.relu(q @ k.bfloat16().float().T) * w[..., None]).sum(1).topk(3).values


@entry(SPELLINGS)
def scales_in_many_places(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.relu((q.float() @ k.float().T) / math.sqrt(D)) * 2.0
    return ((scores * (w * H**-0.5)[..., None]).sum(1) / 3).topk(3).values


@entry(SPELLINGS)
def mean_over_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (torch.relu(q.float() @ k.float().T) * w[..., None]).mean(1).topk(3).values


@entry(SPELLINGS)
def causal_by_tril(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = (torch.relu(q.float() @ k.float().T) * w[..., None]).sum(1)
    return scores.masked_fill(~causal(), -INF).topk(1).values


@entry(SPELLINGS)
def causal_by_positions(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = (torch.relu(q.float() @ k.float().T) * w[..., None]).sum(1)
    hidden = torch.arange(T)[None] > (torch.arange(S) + T - S)[:, None]
    return torch.where(hidden, -INF, scores).topk(1).values


@entry(SPELLINGS)
def causal_by_triu_of_infinity(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = (torch.relu(q.float() @ k.float().T) * w[..., None]).sum(1)
    return (scores + torch.full((S, T), -INF).triu(T - S + 1)).topk(1).values


@entry(SPELLINGS, with_mask())
def bits_as_a_summand(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    scores = (torch.relu(q.float() @ k.float().T) * w[..., None]).sum(1)
    return (scores + torch.where(mask, 0.0, -INF)).topk(1).values


@entry(SPELLINGS, with_mask())
def hidden_by_the_lowest_number(q: Tensor, k: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    scores = (torch.relu(q.float() @ k.float().T) * w[..., None]).sum(1)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).topk(3).values


@entry(SPELLINGS, lambda: (*qkw(B)(), torch.tensor([T, T - 3])))
def lengths_of_sequences(q: Tensor, k: Tensor, w: Tensor, lengths: Tensor) -> Tensor:
    """Padded keys are hidden by a comparison with data."""
    scores = torch.einsum("bsht,bsh->bst", torch.relu(torch.einsum("bshd,btd->bsht", q.float(), k.float())), w)
    return scores.masked_fill((torch.arange(T) >= lengths[:, None])[:, None], -INF).topk(3).values


@entry(SPELLINGS, qkw(queries=1))
def decode(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """One query: matrix products of two axes."""
    return (w @ torch.relu(q[0].float() @ k.float().T)).topk(3).values


@entry(SPELLINGS, qkw(B, queries=1))
def decode_with_batches(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.relu(torch.bmm(q.squeeze(1).float(), k.float().mT))
    return torch.bmm(w, scores).squeeze(1).topk(3).values


@entry(SPELLINGS, float8())
def float8_keys_with_scales(q: Tensor, k: Tensor, w: Tensor, k_scale: Tensor) -> Tensor:
    """Dequantised keys; the scale of q is in the weights."""
    scores = torch.einsum("shd,td->sht", q.float(), k.float() * k_scale)
    return (scores.relu() * w[..., None]).sum(1).topk(3).values


@entry(SPELLINGS, float8("qk"))
def float8_with_both_scales(q: Tensor, k: Tensor, w: Tensor, q_scale: Tensor, k_scale: Tensor) -> Tensor:
    scores = (q.float() * q_scale) @ (k_scale * k.float()).T
    return torch.einsum("sht,sh->st", scores.relu(), w).topk(3).values


@entry(SPELLINGS, float8("qk"))
def float8_with_scaled_products(q: Tensor, k: Tensor, w: Tensor, q_scale: Tensor, k_scale: Tensor) -> Tensor:
    """The scales multiply the products."""
    scores = (q.float() @ k.float().T) * q_scale * k_scale.T
    return torch.einsum("sht,sh->st", scores.relu(), w).topk(3).values


@entry(SPELLINGS, float8())
def float8_with_scaled_scores(q: Tensor, k: Tensor, w: Tensor, k_scale: Tensor) -> Tensor:
    """The scale of the keys multiplies the sums."""
    scores = ((q.float() @ k.float().T).relu() * w[..., None]).sum(1)
    return (scores * k_scale.squeeze(1)).topk(3).values


@entry(SPELLINGS, lambda: (*qkw()(), torch.rand(S, H, 1)))
def two_weights(q: Tensor, k: Tensor, w: Tensor, gate: Tensor) -> Tensor:
    return (torch.relu(q.float() @ k.float().T) * gate * w[..., None]).sum(1).topk(3).values


@entry(SPELLINGS, lambda: (torch.randn(S, 24).bfloat16(), torch.randn(24, H * D).bfloat16(), *qkw()()[1:]))
def a_projection(x: Tensor, weight: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """q is a view of a matrix product."""
    q = (x @ weight).view(S, H, D)
    return (torch.relu(q.float() @ k.float().T) * w[..., None]).sum(1).topk(3).values


@entry(SPELLINGS, lambda: (torch.randn(S, 3 * H * D).bfloat16(), torch.randn(T, 4 * D).bfloat16(), qkw()()[2]))
def windows_of_wider_tensors(packed: Tensor, cache: Tensor, w: Tensor) -> Tensor:
    q, k = packed[:, H * D : 2 * H * D].unflatten(1, (H, D)), cache[:, D : 2 * D]
    return (torch.relu(q.float() @ k.float().T) * w[..., None]).sum(1).topk(3).values


@entry(SPELLINGS, lambda: (*qkw(B)()[:1], qkw()()[1], qkw(B)()[2]))
def sequences_that_share_keys(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (torch.relu(q.float() @ k.float().T) * w[..., None]).sum(2).topk(3).values


@entry(SPELLINGS)
def sorted_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = (torch.relu(q.float() @ k.float().T) * w[..., None]).sum(1)
    return scores.sort(dim=-1, descending=True).values


@entry(SPELLINGS)
def no_selection(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """The scores themselves are the result."""
    return torch.einsum("sht,sh->st", torch.relu(q.float() @ k.float().T), w)


@entry(SPELLINGS)
def scores_that_are_returned_too(q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("sht,sh->st", torch.relu(q.float() @ k.float().T), w)
    return scores, scores.topk(3).values


@entry(SPELLINGS)
def rounded_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.einsum("sht,sh->st", torch.relu(q.float() @ k.float().T), w)
    return scores.bfloat16().topk(3).values


@entry(SPELLINGS, qkw(heads=12))
def twelve_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("sht,sh->st", torch.relu(q.float() @ k.float().T), w).topk(3).values


@entry(SPELLINGS, lambda: (*qkw()(), torch.tensor(0.7)))
def a_scale_in_a_tensor(q: Tensor, k: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return torch.einsum("sht,sh->st", torch.relu(q.float() @ k.float().T * scale), w).topk(3).values
