"""Queries, keys and values out of the convolution of a linear attention layer, as serving engines spell its prefill.

    python examples/convolved_qkv.py                       # tiny, also without a GPU
    python examples/convolved_qkv.py --real --tokens 4096  # the width of Qwen3-Next

The three are projected together and pass through one causal convolution over time, which leaves them channels first.
They are cut apart there, and the kernel of the delta rule wants each of them in order, tokens first: three copies with
strides, for which stock Inductor launches three kernels. `qkv_split` is one.

Convolution and delta rule are ops of `torch.library` here, as they are kernels of the engine there. Where Inductor
generates the code of a neighbour it fuses the copies with it, and the plugin leaves them alone. The delta rule behind
them is this package's, which reads strided tensors as well: called by its name it would need no copies at all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _compare
import torch
from torch import Tensor
from torch.nn import Conv1d, Linear, Module, Sequential
from torch.nn.functional import conv1d, logsigmoid, rms_norm, silu

from fusion_passes.ops.chunk_delta_rule import chunk_delta_rule

KERNEL, DIM = 4, 128  # taps of the convolution, channels of a head


@torch.library.custom_op("examples::causal_conv1d", mutates_args=())
def causal_conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """silu of a convolution that looks back only; x is [B, channels, T], weight [channels, 1, KERNEL]."""
    return silu(conv1d(x, weight, padding=KERNEL - 1, groups=len(weight))[..., : x.shape[-1]]).contiguous()


@causal_conv1d.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("examples::delta_rule", mutates_args=())
def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule of contiguous q, k [B, T, HK, DIM] and v [B, T, HV, DIM]; like v."""
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    return chunk_delta_rule(q, k, v, decay, beta, norm_eps=1e-6)[0]


@delta_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    return torch.empty_like(v)


class GatedDeltaNet(Module):
    """One layer: x [B, T, hidden] plus what it remembers."""

    def __init__(self, hidden: int, key_heads: int, value_heads: int) -> None:
        super().__init__()
        self.widths = [key_heads * DIM, key_heads * DIM, value_heads * DIM]
        self.qkv, self.gates = Linear(hidden, sum(self.widths), False), Linear(hidden, 2 * value_heads, False)
        self.conv = Conv1d(sum(self.widths), sum(self.widths), KERNEL, groups=sum(self.widths), bias=False)
        self.out = Linear(value_heads * DIM, hidden, False)

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, x.shape[-1:])
        decay, beta = self.gates(normed).chunk(2, -1)
        mixed = causal_conv1d(self.qkv(normed).transpose(1, 2), self.conv.weight)

        # The call site: this becomes one launch.
        q, k, v = mixed.transpose(1, 2).split(self.widths, -1)
        q, k, v = (part.unflatten(-1, (-1, DIM)).contiguous() for part in (q, k, v))

        return x + self.out(delta_rule(q, k, v, logsigmoid(decay.float()), beta.sigmoid()).flatten(-2))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 if the results agree."""
    parser = _compare.parser(__doc__)
    parser.add_argument("--layers", type=int, default=2)
    args = _compare.parsed(parser, argv, tokens=64)

    device, dtype = _compare.place(args.real)
    hidden, *heads = (2048, 16, 32) if args.real else (64, 1, 2)
    with torch.device(device):
        torch.manual_seed(0)
        layers = [GatedDeltaNet(hidden, *heads) for _ in range(args.layers)]
        model = Sequential(*layers).to(dtype).requires_grad_(False)
        x = torch.randn(1, args.tokens, hidden, dtype=dtype)
    print(f"{args.layers} layers, {args.tokens} tokens, {heads[0]} and {heads[1]} heads, {dtype} on {device}")
    return 0 if _compare.whole(model, device, {"input": x}) else 1


if __name__ == "__main__":
    sys.exit(main())
