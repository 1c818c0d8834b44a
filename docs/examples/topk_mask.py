import torch

from fusion_passes.testing import assert_fuses, assert_refuses


def mask(scores, most=512):  # [B, S, T]: 0 for the keys that each query sees
    chosen = scores.topk(most, dim=-1).indices
    return torch.full_like(scores, float("-inf")).scatter_(-1, chosen, 0.0)


assert_fuses(mask, torch.randn(1, 16, 2048), fusion="topk_mask")
assert_refuses(mask, torch.randn(1, 16, 1000), fusion="topk_mask", reason="rows of 1,024 to 32,768 entries")


def gathered(scores):
    return scores.gather(-1, scores.topk(512).indices)


assert_refuses(gathered, torch.randn(1, 16, 2048), fusion="topk_mask", reason="for which their order matters")
