import torch

from fusion_passes.testing import assert_fuses, assert_refuses


def pack(latent, weight, k_pe):  # [T, L], [L, H * (N + V)], [T, R]
    k_nope, v = (latent @ weight).unflatten(-1, (4, -1)).split([128, 128], dim=-1)
    k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, 4, -1)], dim=-1)
    return k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)


latent, weight, k_pe = torch.randn(8, 64), torch.randn(64, 4 * 256), torch.randn(8, 64)

assert_fuses(pack, latent, weight, k_pe, fusion="mla_kv_pack", rtol=0, atol=0)


def rotated(latent, weight, k_pe):
    return pack(latent, weight, k_pe * 2 + 1)


# Computed by pointwise operators, k_pe need not go to memory: Inductor does better on its own.
reason = "k_pe is computed by"
assert_refuses(rotated, latent, weight, k_pe, fusion="mla_kv_pack", reason=reason)
