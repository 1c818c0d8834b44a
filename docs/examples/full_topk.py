import torch

from fusion_passes.testing import assert_fuses, assert_refuses


def mask(scores, most=64):  # [B, S, T]: the keys that each query does not see
    chosen = scores.topk(min(most, scores.shape[-1]), dim=-1).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter(-1, chosen, False)


assert_fuses(mask, torch.randn(1, 16, 64), fusion="full_topk")
assert_refuses(mask, torch.randn(1, 16, 100), fusion="full_topk")  # of 100 keys, the scores decide which 36 are hidden


def reordered(scores):
    return scores.gather(-1, scores.topk(64).indices)


assert_refuses(reordered, torch.randn(1, 16, 64), fusion="full_topk", reason="for which their order matters")
