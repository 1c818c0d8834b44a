import torch

from fusion_passes.testing import assert_fuses, assert_refuses


def project(x, weight):  # [T, D], [D, (8 + 2 + 2) * 64]
    q, k, v = (x @ weight).split([512, 128, 128], dim=-1)
    return q.contiguous().view(-1, 8, 64), k.contiguous().view(-1, 2, 64), v.contiguous().view(-1, 2, 64)


x, weight = torch.randn(16, 32), torch.randn(32, 768)
assert_fuses(project, x, weight, fusion="qkv_split")


def behind_relu(x):
    return tuple(part.contiguous() for part in x.relu().split(256, dim=-1))


# Computed by a pointwise operator, the tensor need not go to memory: Inductor does better on its own.
reason = "which Inductor fuses with the copies"
assert_refuses(behind_relu, torch.randn(16, 768), fusion="qkv_split", reason=reason)
