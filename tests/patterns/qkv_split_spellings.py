"""Ways to cut queries, keys and values out of one tensor and make each contiguous, as different engineers write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

B, T, H, K = 2, 6, 2, 16
W = H * K  # columns of the queries, and of the keys; the values have twice as many
D = 4 * W


@dataclasses.dataclass(frozen=True)
class Spelling:
    """A function and what makes its arguments."""

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


SPELLINGS: dict[str, Spelling] = {}


def spelling(*shapes: tuple[int, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function of tensors of the given shapes under its name."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        SPELLINGS[function.__name__] = Spelling(function, lambda: tuple(numbers(*shape) for shape in shapes))
        return function

    return enter


# --- rows: neighbouring columns next to each other --------------------------------------------------------------------


@spelling((B, T, D))
def split_view_contiguous(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.split([W, W, 2 * W], dim=-1)
    return (
        q.view(B, T, H, K).contiguous(),
        k.view(B, T, H, K).contiguous(),
        v.view(B, T, 2 * H, K).contiguous(),
    )


@spelling((B, T, D))
def slices(x: Tensor) -> tuple[Tensor, ...]:
    parts = x[..., :W], x[..., W : 2 * W], x[..., 2 * W :]
    return tuple(p.contiguous().reshape(B, T, -1, K) for p in parts)


@spelling((B, T, 3 * W))
def chunks(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(c.contiguous() for c in x.chunk(3, dim=2))


@spelling((B, T, D))
def narrows_out_of_order(x: Tensor) -> tuple[Tensor, ...]:
    v = x.narrow(-1, 2 * W, 2 * W).contiguous()
    k = x.narrow(-1, W, W).contiguous()
    q = x.narrow(-1, 0, W).contiguous()
    return q, k, v


@spelling((B, T, 3, H, K))
def unbind_middle(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.unbind(2)
    return q.contiguous(), k.contiguous(), v.contiguous()


@spelling((B, T, 3 * W))
def unflatten_and_select(x: Tensor) -> tuple[Tensor, ...]:
    parts = x.unflatten(-1, (3, H, K))
    return parts[:, :, 0].contiguous(), parts[:, :, 1].contiguous(), parts.select(2, -1).contiguous()


@spelling((B, T, 3 * W))
def einops_qkv(x: Tensor) -> tuple[Tensor, ...]:
    """rearrange(x, "b t (n h k) -> n b t h k") and unbind."""
    parts = x.reshape(B, T, 3, H, K).permute(2, 0, 1, 3, 4)
    return tuple(p.contiguous() for p in parts)


@spelling((B, T, 3 * W))
def one_copy_per_index(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.view(B, T, 3, W)[:, :, i].clone(memory_format=torch.contiguous_format) for i in range(3))


@spelling((B, T, D))
def as_strided_windows(x: Tensor) -> tuple[Tensor, ...]:
    def window(start: int, heads: int) -> Tensor:
        return torch.as_strided(x, (B, T, heads, K), (T * D, D, K, 1), start).contiguous()

    return window(0, H), window(W, H), window(2 * W, 2 * H)


@spelling((B, T, D))
def heads_first(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.split([W, W, 2 * W], dim=-1)
    return tuple(p.unflatten(-1, (-1, K)).transpose(1, 2).contiguous() for p in (q, k, v))


@spelling((B, T, D))
def heads_first_by_reshape(x: Tensor) -> tuple[Tensor, ...]:
    """Flattening heads that were brought to the front copies."""
    parts = torch.tensor_split(x, (W, 2 * W), dim=-1)
    return tuple(p.view(B, T, -1, K).permute(0, 2, 1, 3).reshape(-1, T, K) for p in parts)


@spelling((B, T, D))
def flattened_rows(x: Tensor) -> tuple[Tensor, ...]:
    """Reshaping a window to rows and channels copies."""
    return tuple(p.reshape(-1) for p in x.split([W, W, 2 * W], dim=-1))


@spelling((B * T, D))
def tokens_only(x: Tensor) -> tuple[Tensor, ...]:
    q, kv = x.split([W, 3 * W], dim=1)
    k, v = kv[:, :W], kv[:, W:]
    return q.contiguous(), k.contiguous(), v.contiguous()


@spelling((B, T, 2 * W))
def keys_and_values_alone(x: Tensor) -> tuple[Tensor, ...]:
    k, v = x.chunk(2, dim=-1)
    return k.contiguous().view(B, T, H, K), v.contiguous().view(B, T, H, K)


@spelling((B, T, 13 * 8))
def many_windows(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.contiguous() for p in x.split(8, dim=-1))


@spelling((B, T, D))
def repeated_keys(x: Tensor) -> tuple[Tensor, ...]:
    """Grouped-query attention: every key and value head serves two query heads."""
    q, k, v = x.split([2 * W, W, W], dim=-1)
    k, v = (p.view(B, T, H, 1, K).expand(B, T, H, 2, K).reshape(B, T, 2 * H, K) for p in (k, v))
    return q.view(B, T, 2 * H, K).contiguous(), k, v


@spelling((B, T, D))
def repeated_interleaved(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.split([W, W, 2 * W], dim=-1)
    q, k = (p.unflatten(-1, (H, K)).repeat_interleave(2, dim=2) for p in (q, k))
    return q, k, v.unflatten(-1, (2 * H, K)).contiguous()


@spelling((B, T, D))
def repeated_heads_first(x: Tensor) -> tuple[Tensor, ...]:
    """repeat_kv of Hugging Face on heads that come first."""
    q, k, v = (p.unflatten(-1, (-1, K)).transpose(1, 2) for p in x.split([2 * W, W, W], dim=-1))
    k, v = (p[:, :, None].expand(B, H, 2, T, K).reshape(B, 2 * H, T, K) for p in (k, v))
    return q.contiguous(), k, v


@spelling((B, T, D + 2 * W))
def in_front_of_a_gate(x: Tensor) -> tuple[Tensor, ...]:
    """The rest of the row is read through its strides."""
    q, k, v, gate = x.split([W, W, 2 * W, 2 * W], dim=-1)
    return q.contiguous(), k.contiguous(), v.contiguous(), torch.mm(gate[0], gate[1].T)


@spelling((T, B, D))
def sequence_first_input(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.transpose(0, 1).split([W, W, 2 * W], dim=-1)
    return tuple(p.unflatten(-1, (-1, K)).contiguous() for p in (q, k, v))


@spelling((B, T, 24 * 7))
def odd_widths(x: Tensor) -> tuple[Tensor, ...]:
    """Heads of 24 channels, five and two of them."""
    return x[..., : 24 * 5].unflatten(-1, (5, 24)).contiguous(), x[..., 24 * 5 :].unflatten(-1, (2, 24)).contiguous()


@spelling((B, T, H, 3, K))
def interleaved_heads(x: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value of each head next to each other: tokens and heads are the rows."""
    return tuple(x[:, :, :, i].contiguous() for i in range(3))


@spelling((B, T, 3 * W))
def heads_outermost(x: Tensor) -> tuple[Tensor, ...]:
    """[H, B, T, K]: batch and tokens are one axis."""
    return tuple(p.unflatten(-1, (H, K)).permute(2, 0, 1, 3).contiguous() for p in x.chunk(3, -1))


@spelling((B, T, 2 * W))
def windows_repeated_as_a_whole(x: Tensor) -> tuple[Tensor, ...]:
    """All heads, and all heads again: one wide head, repeated."""
    return tuple(
        p.view(B, T, 1, H, K).expand(B, T, 2, H, K).clone(memory_format=torch.contiguous_format)
        for p in x.chunk(2, dim=-1)
    )


# --- behind a convolution: neighbouring tokens next to each other -----------------------------------------------------


@spelling((B, D, T))
def strided_split(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.transpose(1, 2).split([W, W, 2 * W], dim=-1)
    return q.view(B, T, H, K).contiguous(), k.view(B, T, H, K).contiguous(), v.view(B, T, 2 * H, K).contiguous()


@spelling((B, D, T))
def strided_chunks_before_the_transpose(x: Tensor) -> tuple[Tensor, ...]:
    parts = x[:, :W], x[:, W : 2 * W], x[:, 2 * W :]
    return tuple(p.mT.contiguous() for p in parts)


@spelling((B, D, T + 3))
def strided_causal_tail(x: Tensor) -> tuple[Tensor, ...]:
    """A causal convolution leaves three columns too many."""
    q, k, v = x[..., :T].permute(0, 2, 1).split([W, W, 2 * W], dim=-1)
    return tuple(p.reshape(B, T, -1, K).contiguous() for p in (q, k, v))


@spelling((B, D, T))
def strided_heads_first(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.split([W, W, 2 * W], dim=1)
    return tuple(p.unflatten(1, (-1, K)).transpose(2, 3).contiguous() for p in (q, k, v))


@spelling((B, D, T))
def strided_repeated(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.mT.split([W, W, 2 * W], dim=-1)
    q, k = (p.unflatten(-1, (H, K)).repeat_interleave(2, dim=2) for p in (q, k))
    return q, k, v.unflatten(-1, (2 * H, K)).contiguous()


@spelling((D, T))
def strided_one_sequence(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.t().contiguous() for p in x.split([W, W, 2 * W]))


@spelling((D, B * T))
def strided_as_strided(x: Tensor) -> tuple[Tensor, ...]:
    rows = B * T
    q = x.as_strided((rows, H, K), (1, K * rows, rows), 0)
    k = x.as_strided((rows, H, K), (1, K * rows, rows), W * rows)
    v = x.as_strided((rows, 2 * H, K), (1, K * rows, rows), 2 * W * rows)
    return q.contiguous(), k.contiguous(), v.contiguous()


# --- producers and consumers --------------------------------------------------------------------------------------


@spelling((B, T, 24), (24, D))
def after_a_projection(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x @ weight).split([W, W, 2 * W], dim=-1)
    return q.contiguous(), k.contiguous(), v.contiguous()


@spelling((B, D, T + 3), (D, 1, 4))
def after_a_convolution(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    mixed = torch.nn.functional.conv1d(x, weight, groups=D).mT
    q, k, v = mixed.split([W, W, 2 * W], dim=-1)
    return tuple(p.unflatten(-1, (-1, K)).contiguous() for p in (q, k, v))


@spelling((B, T, 4, H, K))
def in_front_of_a_matrix_product(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v, w = (p.transpose(1, 2).contiguous() for p in x.unbind(2))
    return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT), torch.bmm(v.flatten(0, 1), w.flatten(0, 1).mT)


@spelling((B, T, D))
def copied_into_buffers(x: Tensor) -> tuple[Tensor, ...]:
    found = []
    for part in x.split([W, W, 2 * W], dim=-1):
        buffer = torch.empty(part.shape)
        buffer.copy_(part)
        found.append(buffer)
    return tuple(found)
