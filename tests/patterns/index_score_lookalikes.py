"""What resembles an index score and must be left alone, each with the reason that has to be given."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tests.patterns.index_score_cases import D, H, S, T, Table, entry, qkw

LOOKALIKES: Table = {}

NO_SUM = "it is not scale * sum of w * relu(q . k)"


def products(q: Tensor, k: Tensor) -> Tensor:
    """[S, H, T]"""
    return q.float() @ k.float().T


def scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """What the fusion would take."""
    return (products(q, k).relu() * w[..., None]).sum(1)


@entry(LOOKALIKES, reason=NO_SUM)
def gelu(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (functional.gelu(products(q, k)) * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def silu(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (functional.silu(products(q, k)) * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def half_of_the_absolute_value(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """NaN where a product is minus infinity, which relu makes 0."""
    x = products(q, k)
    return ((x + x.abs()) * 0.5 * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def times_is_positive(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Likewise."""
    x = products(q, k)
    return (x * (x > 0) * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def leaky_relu(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (functional.leaky_relu(products(q, k)) * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def relu_with_an_upper_bound(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k).clamp(0.0, 50.0) * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def clamp_at_another_number(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k).clamp_min(0.01) * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def relu_with_a_threshold(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (functional.threshold(products(q, k), 1e-4, 0.0) * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def squared_relu(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k).relu().square() * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def absolute_value(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k).abs() * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def negative_part(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k).clamp(max=0.0) * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def relu_of_the_weighted_products(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """The weights, of either sign, are inside of the relu, and others outside."""
    return ((products(q, k) * w[..., None] * w[..., None]).sin().relu() * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def weights_inside_alone(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k) * w[..., None]).relu().sum(1).topk(3).values


@entry(LOOKALIKES, reason="it has no weight per head")
def no_weights(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return products(q, k).relu().sum(1).topk(3).values


@entry(LOOKALIKES, reason="it has no weight per head")
def weights_per_query(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k).relu() * w[:, :1, None]).sum(1).topk(3).values


@entry(LOOKALIKES, lambda: (*qkw()()[:2], torch.randn(S, H, T)), "its weights depend on the key")
def weights_per_key(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k).relu() * w).sum(1).topk(3).values


def own_keys(groups: int) -> tuple[Tensor, ...]:
    """The usual q and w, and keys for every group of heads."""
    q, _, w = qkw()()
    return q, torch.randn(groups, T, D).bfloat16(), w


@entry(LOOKALIKES, lambda: own_keys(H), "its keys differ from head to head")
def keys_per_head(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("sht,sh->st", torch.einsum("shd,htd->sht", q.float(), k.float()).relu(), w).topk(3).values


@entry(LOOKALIKES, lambda: own_keys(2), "its keys differ from head to head")
def keys_per_group_of_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    wide = k.float().repeat_interleave(H // 2, 0)
    return torch.einsum("sht,sh->st", torch.einsum("shd,htd->sht", q.float(), wide).relu(), w).topk(3).values


@entry(LOOKALIKES, reason="the scores are multiplied by -2")
def negative_scale(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k).relu() * -2.0 * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason="the scores are multiplied by -0.5")
def negative_scale_before_the_sum(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k).relu() * -0.5 * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def negative_scale_before_the_relu(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """relu of the negated products, of which the positive ones count nothing."""
    return ((products(q, k) * -0.5).relu() * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason="it has no weight per head")
def sum_over_keys(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """What is left are scores of heads."""
    return (products(q, k).relu() * w[..., None]).sum(2).topk(3).values


@entry(LOOKALIKES)
def sum_over_some_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """The last head counts twice."""
    weighted = products(q, k).relu() * w[..., None]
    return (torch.cat([weighted, weighted[:, -1:]], 1)).sum(1).topk(3).values


@entry(LOOKALIKES, reason="an intermediate (relu")
def activated_products_are_returned(q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    activated = products(q, k).relu()
    return (activated * w[..., None]).sum(1).topk(3).values, activated


@entry(LOOKALIKES, reason="is used elsewhere")
def products_are_used_elsewhere(q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    raw = products(q, k)
    return (raw.relu() * w[..., None]).sum(1).topk(3).values, raw.amax(-1)


@entry(LOOKALIKES, qkw(heads=1), "it has a single head")
def one_head(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return (products(q, k).relu() * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, qkw(heads=160, width=16), "it has 160 heads")
def too_many_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return scores(q, k, w).topk(3).values


@entry(LOOKALIKES, qkw(width=12), "its heads have 12 channels")
def odd_channels(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return scores(q, k, w).topk(3).values


@entry(LOOKALIKES, qkw(width=264), "its heads have 264 channels")
def wide_heads(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return scores(q, k, w).topk(3).values


@entry(LOOKALIKES, lambda: (qkw()()[0], torch.randn(D, T).bfloat16(), qkw()()[2]), "elements apart in memory")
def transposed_keys(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """The channels of the keys are not neighbours."""
    return scores(q, k.T, w).topk(3).values


@entry(LOOKALIKES, qkw(dtype=torch.float64), "q is float64")
def double_precision(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return ((q @ k.T).relu() * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def a_bias_before_the_relu(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return ((products(q, k) + 0.1).relu() * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def a_constant_per_head(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return ((products(q, k).relu() + 1.0) * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason=NO_SUM)
def positions_in_the_products(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """ALiBi: a summand per position before the relu, which is a tensor of its own."""
    return ((products(q, k) + torch.arange(T) * 0.1).relu() * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason="its weights depend on the key")
def a_mask_before_the_sum(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Hidden products count 0; the scores are not hidden."""
    seen = torch.ones(S, 1, T, dtype=torch.bool).tril()
    return (products(q, k).masked_fill(~seen, 0.0).relu().cos() * w[..., None]).sum(1).topk(3).values


@entry(LOOKALIKES, reason="it has no weight per head")
def linear_attention(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Similarities of features, without weights."""
    return torch.relu(products(q, k)).sum(1).softmax(-1)


@entry(LOOKALIKES, lambda: (torch.randn(S, D), torch.randn(D, 4 * D), torch.randn(4 * D, D)))
def an_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.relu(x @ up) @ down


@entry(LOOKALIKES, lambda: (torch.randn(3, S, D), torch.randn(3, D, 4 * D), torch.randn(3, 4 * D, D)))
def experts(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.bmm(torch.relu(torch.bmm(x, up)), down)


@entry(LOOKALIKES, lambda: (torch.randn(S, D), torch.randn(D, H)))
def a_router(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight).softmax(-1).topk(2).values


@entry(LOOKALIKES, lambda: (torch.randn(S, D), torch.randn(D, H)))
def a_router_with_relu(x: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(x @ weight).clamp(max=6.0).topk(2).values


@entry(LOOKALIKES, lambda: (torch.randn(S, D), torch.randn(D, H), torch.randn(H)))
def a_router_with_groups(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    choice = (x @ weight).sigmoid() + bias
    groups = choice.view(S, 2, H // 2).topk(2).values.sum(-1)
    return groups.topk(1).indices


@entry(LOOKALIKES, lambda: (torch.randn(S, 32),))
def selection_from_something_else(x: Tensor) -> Tensor:
    return (x.relu() * 2).topk(3).values
