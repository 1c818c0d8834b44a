import torch

from fusion_passes.testing import assert_fuses, assert_refuses


def systems(k, v, g, beta, chunk=64):  # k [B, T, H, K], v [B, T, H, V], g and beta [B, T, H]
    k, v, g, beta = (x.transpose(1, 2).unflatten(2, (-1, chunk)) for x in (k, v, g, beta))
    sums, strength = g.cumsum(-1), beta[..., None]
    decay = (sums[..., :, None] - sums[..., None, :]).tril().exp()
    system = (k * strength @ k.mT * decay).tril(-1)
    sides = torch.cat([v, k * sums.exp()[..., None]], -1) * strength
    return torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)


k, v = (torch.randn(1, 256, 2, 64) / 8 for _ in range(2))
g, beta = -torch.rand(1, 256, 2), torch.rand(1, 256, 2)
assert_fuses(systems, k, v, g, beta, fusion="delta_rule_intra")

# Chunks of another length have no kernel.
args = k, v, g, beta, 128
assert_refuses(systems, *args, fusion="delta_rule_intra", reason="its chunks have 128 tokens; the kernels have 16, 32")
