import torch
import torch.nn.functional as F

from fusion_passes.testing import assert_fuses, assert_refuses


def gate(raw, a_log, bias):  # [B, T, H, K], [H], [H, K]
    decay = -a_log.exp()[:, None] * F.softplus(raw.float() + bias)
    return decay.unflatten(1, (-1, 64)).cumsum(2)


raw, a_log, bias = torch.randn(1, 256, 2, 32).bfloat16(), torch.rand(2), torch.randn(2, 32)
assert_fuses(gate, raw, a_log, bias, fusion="gate_cumsum")

# Computed by a pointwise operator, raw need not go to memory: Inductor does better on its own.
reason = "the gate's input is computed by a pointwise node"
assert_refuses(lambda raw, *rest: gate(raw.relu(), *rest), raw, a_log, bias, fusion="gate_cumsum", reason=reason)
