import torch

from fusion_passes.testing import assert_fuses, assert_refuses


def joined(x):
    left, right = x.split(512, dim=-1)
    return torch.cat([left, right], dim=-1).sin()


def swapped(x):
    left, right = x.split(512, dim=-1)
    return torch.cat([right, left], dim=-1).sin()


def cached(cache, keys, values):  # [2, T, D], [S, D], [S, D]
    cache[0, :4] = keys
    cache[1, :4] = values
    return cache.sum()


x = torch.randn(64, 1024)
assert_fuses(joined, x, fusion="redundant_copy")
assert_refuses(swapped, x, fusion="redundant_copy", reason="parts of arg0_1 are joined that do not follow one another")
assert_fuses(cached, torch.zeros(2, 4096, 256), torch.ones(4, 256), torch.ones(4, 256), fusion="redundant_copy")

# So small a cache is written anew in less time than two launches take.
small = torch.zeros(2, 8, 16), torch.ones(4, 16), torch.ones(4, 16)
assert_refuses(cached, *small, fusion="redundant_copy", reason="stock is faster with one")
