import torch
import torch.nn.functional as F

from fusion_passes.testing import assert_fuses, assert_refuses


def weights(x, weight, q_scale):  # [T, 512], [16, 512], [T, 16]
    return F.linear(x.float(), weight) * 16**-0.5 * q_scale


x, weight, q_scale = torch.randn(8, 512).bfloat16(), torch.randn(16, 512), torch.rand(8, 16)
assert_fuses(weights, x, weight, q_scale, fusion="head_gate")

# A product that no constant scales is an ordinary linear layer.
reason = "is not scaled by a constant"
assert_refuses(lambda x, w, q: F.linear(x.float(), w) * q, x, weight, q_scale, fusion="head_gate", reason=reason)
