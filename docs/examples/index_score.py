import torch

from fusion_passes.testing import assert_fuses, assert_refuses


def select(q, k, w):  # queries [B, S, H, D], keys [B, T, D], weights of the heads [B, S, H]
    products = torch.einsum("bshd,btd->bsht", q, k).relu()
    scores = (products * w.unsqueeze(-1)).sum(2) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).topk(8).indices


q, k, w = torch.randn(1, 64, 8, 64), torch.randn(1, 64, 64), torch.randn(1, 64, 8)
assert_fuses(select, q, k, w, fusion="index_score")


def with_sigmoid(q, k, w):
    products = torch.einsum("bshd,btd->bsht", q, k).sigmoid()
    return (products * w.unsqueeze(-1)).sum(2).topk(8).indices


reason = "it is not scale * sum of w * relu(q . k) over the heads"
assert_refuses(with_sigmoid, q, k, w, fusion="index_score", reason=reason)
