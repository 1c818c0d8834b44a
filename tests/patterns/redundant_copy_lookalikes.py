"""Copies that are needed: name -> (function, a part of the reason, or "" where nothing is worth a word).

Inputs as for the spellings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Lookalike = tuple[Callable[..., object], str]
Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def moved_by_one(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    x[:, 1:9] = x[:, :8].clone()
    return x


def other_columns(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    x[:, :8] = x[:, 8:]
    return x


def other_step(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    x[:8:2] = x[:4].clone()
    return x


def transposed(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    x[:8, :8] = x[:8, :8].t().clone()
    return x


def broadcast_row(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    x[:8] = x[:1].clone()
    return x


def flipped(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    x[:, :8] = x[:, :8].flip(1)
    return x


def doubled(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    x[:, :8] = x[:, :8] * 2
    return x


def rounded(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    x[:, :8] = x[:, :8].bfloat16().float()
    return x


def of_another(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x, y = c @ w, c @ w.t()
    x[:, :8] = y[:, :8]
    return x


def before_a_write(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    old = x[:, :8].clone()
    x[:4] = k
    x[:, :8] = old
    return x


def before_a_kernel(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    old = x[:, :8].clone()
    torch.ops.fusion_passes_tests.double_(x)
    x[:, :8] = old
    return x


def input_returned(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    y = c.clone()
    y[:, :8] = c[:, :8]
    return y


def joined_input(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    return torch.cat([c[:, :4], c[:, 4:]], 1)


def joined_part_of_input(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    half = c[:12]
    return torch.cat([half[:, :4], half[:, 4:]], 1)


def joined_and_returned(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x = c @ w
    return x, torch.cat([x[:, :4], x[:, 4:]], 1)


def joined_view_returned(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x = c @ w
    return x[2:4], torch.cat([x[:, :4], x[:, 4:]], 1)


def joined_twice(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    return torch.cat([x[:, :8], x[:, :8]], 1)


def joined_swapped(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    return torch.cat([x[:, 8:], x[:, :8]], 1)


def joined_with_a_gap(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    return torch.cat([x[:, :4], x[:, 8:]], 1)


def joined_overlapping(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    return torch.cat([x[:, :9], x[:, 8:]], 1)


def joined_a_part(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    return torch.cat([x[:, :4], x[:, 4:9]], 1)


def joined_along_another_axis(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    return torch.cat([x[:, :8], x[:, 8:]], 0)


def joined_every_other(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    return torch.cat([x[:, ::2], x[:, 1::2]], 1)


def joined_with_another(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    return torch.cat([x[:, :8], (x * 2)[:, 8:]], 1)


def joined_transposed(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = (c @ w).t()
    return torch.cat([x[:8], x[8:]])


def joined_rows_as_columns(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    return torch.stack(x.unbind(0), 1)


def write_to_an_intermediate(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    x = c @ w
    x[:4] = k
    x[4:8] = v
    return x


def one_write(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[:4] = k


def one_index_put(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[i] = k


def old_copy_returned_later(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    y = c.clone()
    y[:4] = k
    return y


def whole_overwritten(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[:4] = k
    c.copy_(c * 2 + 1)


def kernel_in_between(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[:4] = k
    torch.ops.fusion_passes_tests.double_(c)
    c[4:8] = v


def written_copy_of_input(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    other = s[0].clone()
    other[:4] = k
    other[4:8] = v
    c.copy_(other)


def read_between(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    c[:4] = k
    product = c @ w
    c[2:8] = 0
    return product


def moved_twice(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[1:] = c[:-1].clone()
    c[:, 2:] = c[:, :-2].clone()


def disjoint_arithmetic(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[:4].add_(k)
    c[4:8].mul_(2)


LOOKALIKES: dict[str, Lookalike] = {
    f.__name__: (f, reason)
    for f, reason in (
        (moved_by_one, "to another place"),
        (other_columns, "to another place"),
        (other_step, "to another place"),
        (transposed, "to another place"),
        (broadcast_row, "to another place"),
        (flipped, ""),
        (doubled, ""),
        (rounded, ""),
        (of_another, ""),
        (before_a_write, "overwritten in between"),
        (before_a_kernel, ""),
        (input_returned, "share memory with an input"),
        (joined_input, "share memory with an input"),
        (joined_part_of_input, "share memory with an input"),
        (joined_and_returned, "share memory with another result"),
        (joined_view_returned, "share memory with another result"),
        (joined_twice, "do not follow one another"),
        (joined_swapped, "do not follow one another"),
        (joined_with_a_gap, "do not follow one another"),
        (joined_overlapping, "do not follow one another"),
        (joined_a_part, "not all of a tensor"),
        (joined_along_another_axis, "do not follow one another"),
        (joined_every_other, "do not follow one another"),
        (joined_with_another, ""),
        (joined_transposed, "strides"),
        (joined_rows_as_columns, "not all of a tensor"),
        (write_to_an_intermediate, ""),
        (one_write, ""),
        (one_index_put, ""),
        (old_copy_returned_later, ""),
        (whole_overwritten, ""),
        (kernel_in_between, "not into the input"),
        (written_copy_of_input, "not into the input"),
        (disjoint_arithmetic, "may put it behind both"),
        (read_between, "may put it behind both"),
        (moved_twice, "may put it behind both"),
    )
}
