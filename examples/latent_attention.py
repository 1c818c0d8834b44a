"""Multi-head latent attention with float8 keys and values, as serving engines spell it.

    python examples/latent_attention.py                       # tiny, also without a GPU
    python examples/latent_attention.py --real --tokens 4096  # the width of DeepSeek-V3

Keys and values come out of one projection of the latent vector. The rotary part of the key is one for all heads, so the
key is put together from two tensors: an empty one, two slices that are assigned, and a cast. The value is cast beside
it. Stock Inductor launches two kernels for this; `mla_kv_pack` is one.

The rotary embedding and attention itself are ops of `torch.library` here, as they are kernels of the engine there. What
Inductor generates code for, it would fuse with the key, and then the plugin leaves both alone: see `mla_kv_pack` in the
reports of `sparse_attention.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import _compare
import torch
from torch import Tensor
from torch.nn import Linear, Module, Sequential
from torch.nn.functional import rms_norm, scaled_dot_product_attention

NOPE, ROPE, VALUE = 128, 64, 128  # channels of a head
FLOAT8 = torch.float8_e4m3fn
# One value of float8 that is rounded the other way is a larger difference than float32 makes elsewhere.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


@torch.library.custom_op("examples::rotate", mutates_args=())
def rotate(x: Tensor) -> Tensor:
    """The rotary embedding of pairs of channels; x is [T, ..., ROPE]."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    positions = torch.arange(len(x), device=x.device).view(-1, *[1] * (x.dim() - 1))
    angle = positions * 10000.0 ** (-torch.arange(0, ROPE, 2, device=x.device) / ROPE)
    turned = first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()
    return torch.stack(turned, -1).flatten(-2).to(x.dtype)


@rotate.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("examples::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [T, H, D] to float8 keys and values; [T, H, VALUE] in the dtype of q."""
    heads_first = (x.to(q.dtype).transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1).contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(v.shape)


class LatentAttention(Module):
    """One layer: x [T, hidden] plus what it attends to."""

    def __init__(self, hidden: int, heads: int, q_rank: int, kv_rank: int) -> None:
        super().__init__()
        self.heads, self.kv_rank = heads, kv_rank
        self.q_a, self.q_b = Linear(hidden, q_rank, False), Linear(q_rank, heads * (NOPE + ROPE), False)
        self.kv_a, self.kv_b = Linear(hidden, kv_rank + ROPE, False), Linear(kv_rank, heads * (NOPE + VALUE), False)
        self.out = Linear(heads * VALUE, hidden, False)

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, x.shape[-1:])
        q_nope, q_pe = self.q_b(self.q_a(normed)).view(-1, self.heads, NOPE + ROPE).split([NOPE, ROPE], -1)
        q = torch.cat([q_nope, rotate(q_pe)], -1)
        latent, k_pe = self.kv_a(normed).split([self.kv_rank, ROPE], -1)
        k_pe = rotate(k_pe)

        # The call site: this becomes one launch.
        kv = self.kv_b(rms_norm(latent, latent.shape[-1:])).view(-1, self.heads, NOPE + VALUE)
        k_nope, v = kv[..., :NOPE], kv[..., NOPE:]
        k = torch.empty(len(kv), self.heads, NOPE + ROPE, dtype=kv.dtype, device=kv.device)
        k[..., :NOPE] = k_nope
        k[..., NOPE:] = k_pe.unsqueeze(1)
        k, v = k.to(FLOAT8), v.to(FLOAT8)

        return x + self.out(attention(q, k, v).flatten(-2))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 if the results agree."""
    parser = _compare.parser(__doc__)
    parser.add_argument("--layers", type=int, default=2)
    args = _compare.parsed(parser, argv, tokens=24)

    device, dtype = _compare.place(args.real)
    hidden, *sizes = (7168, 128, 1536, 512) if args.real else (64, 2, 32, 32)
    with torch.device(device):
        torch.manual_seed(0)
        layers = [LatentAttention(hidden, *sizes) for _ in range(args.layers)]
        model = Sequential(*layers).to(dtype).requires_grad_(False)
        x = torch.randn(args.tokens, hidden, dtype=dtype)
    print(f"{args.layers} layers, {args.tokens} tokens, {sizes[0]} heads, {dtype} on {device}")
    return 0 if _compare.whole(model, device, {"input": x}, ALLOWED[dtype]) else 1


if __name__ == "__main__":
    sys.exit(main())
