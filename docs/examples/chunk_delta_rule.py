import torch

from fusion_passes.testing import assert_fuses, assert_refuses


def rule(q, k, v, g, beta, chunk=64):  # q, k, v [B, T, H, 64]; g, beta [B, T, H]
    q, k, v, g, beta = (x.transpose(1, 2).unflatten(2, (-1, chunk)) for x in (q, k, v, g, beta))
    sums, strength = g.cumsum(-1), beta[..., None]
    decay = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()
    system = (k * strength @ k.mT * decay).tril(-1)
    sides = torch.cat([v, k * sums.exp()[..., None]], -1) * strength
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    state, outputs = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]), []
    for i in range(q.shape[2]):
        qi, ki, total = q[:, :, i], k[:, :, i], sums[:, :, i]
        new = u[:, :, i] - w[:, :, i] @ state
        outputs.append((qi * total.exp()[..., None]) @ state + (qi @ ki.mT * decay[:, :, i]) @ new)
        rest = (total[..., -1:] - total).exp()[..., None]
        state = state * total[..., -1:, None].exp() + (ki * rest).mT @ new
    return torch.stack(outputs, 2).flatten(2, 3).transpose(1, 2)


q, k, v = (torch.randn(1, 128, 2, 64) / 8 for _ in range(3))
g, beta = -torch.rand(1, 128, 2), torch.rand(1, 128, 2)
assert_fuses(rule, q, k, v, g, beta, fusion="chunk_delta_rule")

# Another width of the keys has no kernel.
q, k = q[..., :32], k[..., :32]
assert_refuses(rule, q, k, v, g, beta, fusion="chunk_delta_rule", reason="K is 32; the kernels have 64, 96, 128")
