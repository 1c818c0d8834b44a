"""Ways to write the copies that are to be found: name -> (function, sites). Inputs: see `arguments`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.redundant_copy_rows import double_

Spelling = tuple[Callable[..., object], int]

ROWS, COLUMNS = 24, 16


def arguments() -> list[Tensor]:
    """A cache [24, 16], two updates [4, 16], indices [4], stacked caches [2, 24, 16] and a weight [16, 16]."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    indices = torch.tensor([20, 3, 9, 3])
    return [normal(ROWS, COLUMNS), normal(4, 16), normal(4, 16), indices, normal(2, ROWS, COLUMNS), normal(16, 16)]


# Written back onto itself: each gets a tensor that nobody else holds, or an input, and returns what follows.


def _setitem(x: Tensor) -> None:
    x[:, :8] = x[:, :8]


def _copy(x: Tensor) -> None:
    x[:, :8].copy_(x[:, :8])


def _held(x: Tensor) -> None:
    part = x[:, 4:]
    x[:, 4:] = part


def _cloned(x: Tensor) -> None:
    x[2:5] = x[2:5].clone()


def _narrow(x: Tensor) -> None:
    x.narrow(1, 2, 5).copy_(x[:, 2:7])


def _negative(x: Tensor) -> None:
    x[:, -4:] = x[:, 12:]


def _row(x: Tensor) -> None:
    x[3] = x[3]


def _last_row(x: Tensor) -> None:
    x[-1].copy_(x.select(0, x.shape[0] - 1))


def _strided(x: Tensor) -> None:
    x[::2, 1::3] = x[::2, 1::3]


def _through_view(x: Tensor) -> None:
    x.view(-1, 4, 4)[:, 1] = x[:, 4:8]


def _through_transpose(x: Tensor) -> None:
    x.t()[:8] = x[:, :8].t()


def _from_split(x: Tensor) -> None:
    _, second = x.split([6, 10], 1)
    x[:, 6:] = second


def _from_chunk(x: Tensor) -> None:
    x[:, 8:] = x.chunk(2, 1)[1]


def _nested(x: Tensor) -> None:
    x[4:12][2:4, :3] = x[6:8, :3]


def _diagonal(x: Tensor) -> None:
    x[:16].diagonal().copy_(x[:16].diagonal())


def _after_other_write(x: Tensor) -> None:
    part = x[:, :4]
    x[:, 8:] = 1.0
    x[:, :4] = part


def _after_kernel(x: Tensor) -> None:
    part = x[:, :8]
    double_(part)
    x[:, :8] = part


WRITTEN_BACK: dict[str, Callable[[Tensor], None]] = {
    f.__name__.strip("_"): f
    for f in (
        _setitem, _copy, _held, _cloned, _narrow, _negative, _row, _last_row, _strided, _through_view,
        _through_transpose, _from_split, _from_chunk, _nested, _diagonal, _after_other_write, _after_kernel,
    )
}  # fmt: skip

JOINED: dict[str, Callable[[Tensor], Tensor]] = {
    "slices": lambda x: torch.cat([x[:, :5], x[:, 5:]], 1),
    "three_slices": lambda x: torch.cat([x[:3], x[3:9], x[9:]]),
    "chunks": lambda x: torch.cat(x.chunk(4, -1), -1),
    "split": lambda x: torch.cat(x.split(6)),
    "split_with_sizes": lambda x: torch.cat(x.split([1, 15], 1), 1),
    "narrow": lambda x: torch.cat([x.narrow(0, 0, 10), x.narrow(0, 10, 14)]),
    "unbind_and_stack": lambda x: torch.stack(x.unbind(0)),
    "rows": lambda x: torch.stack([x[i] for i in range(ROWS)]),
    "nested": lambda x: torch.cat([x[:, :4], torch.cat([x[:, 4:9], x[:, 9:]], 1)], 1),
    "an_empty_part": lambda x: torch.cat([x[:0], x[:7], x[7:]]),
    "of_a_view": lambda x: torch.cat([x.view(-1, 4, 4)[:, :1], x.view(-1, 4, 4)[:, 1:]], 1),
    "unflattened": lambda x: torch.cat([p.flatten(1) for p in x.unflatten(1, (2, 2, 4)).split(1, 1)], 1),
    "cloned_parts": lambda x: torch.cat([x[:, :5].clone(), x[:, 5:].clone()], 1),
}


def _two(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[:4] = k
    c[4:8] = v


def _overlapping(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[2:6] = k
    c[4:8] = v


def _many(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    for row in range(5):
        c[row * 3] = k[row % 4] * row


def _stacked(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    s[0, 5:9] = k
    s[1, 5:9] = v


def _unbound(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    keys, values = s.unbind(0)
    keys[5:9] = k
    values[5:9] = v


def _slice_then_index(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[:4] = k
    c[i] = v


def _index_then_slice(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c.index_put_((i,), v)
    c[:4].copy_(k)


def _accumulated(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[:4] = k
    c.index_put_((i,), v, accumulate=True)


def _stacked_by_index(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    s[0].index_put_((i,), k)
    s[1].index_put_((i,), v)


def _half_by_index(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    s[1, i] = k


def _masked(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    s[0, :4] = k
    s[1][c > 0] = 0.5


def _reshaped(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c.view(-1, 4, 4)[:4, 1] = k[:, :4]


def _transposed(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    s.transpose(0, 1)[2:6, 0] = k
    s.transpose(0, 1)[2:6, 1] = v


def _scalars(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[:4].fill_(2)
    c[8:12].zero_()


def _broadcast(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[:4] = k[0]
    c[6:10, :8] = v[:, :1]


def _cast(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[:4] = k.double()
    c[4:8] = i[:, None]


def _read_after(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    c[:4] = k
    c[4:8] = v
    return c @ w


def _read_before(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    product = c @ w
    c[:4] = k
    c[2:6] = v
    return product


def _write_read_elsewhere(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    c[:4] = k
    product = c[:4] @ w
    c[4:8] = v
    return product


def _source_from_the_region(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    old = c[:4] * 2
    c[:4] = k
    c[4:8] = old


def _moved(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> None:
    c[1:] = c[:-1].clone()


def _copy_returned(c: Tensor, k: Tensor, v: Tensor, i: Tensor, s: Tensor, w: Tensor) -> Tensor:
    c[:4] = k
    return c.clone()


CHAINS: dict[str, Callable[..., object]] = {
    f.__name__.strip("_"): f
    for f in (
        _two, _overlapping, _many, _stacked, _unbound, _slice_then_index, _index_then_slice, _accumulated,
        _stacked_by_index, _half_by_index, _masked, _reshaped, _transposed, _scalars, _broadcast, _cast,
        _read_after, _read_before, _write_read_elsewhere, _source_from_the_region, _moved, _copy_returned,
    )
}  # fmt: skip


def _on_input(change: Callable[[Tensor], None], c: Tensor, *rest: Tensor) -> Tensor:
    change(c)
    return c * 2


def _on_product(change: Callable[[Tensor], None], c: Tensor, *rest: Tensor) -> Tensor:
    x = c @ rest[-1]
    change(x)
    return x


def _joined(join: Callable[[Tensor], Tensor], c: Tensor, *rest: Tensor) -> Tensor:
    return join(c @ rest[-1])


SPELLINGS: dict[str, Spelling] = {
    **{f"back_{name}": (functools.partial(_on_product, f), 1) for name, f in WRITTEN_BACK.items()},
    **{f"back_in_input_{name}": (functools.partial(_on_input, f), 1) for name, f in WRITTEN_BACK.items()},
    **{f"joined_{name}": (functools.partial(_joined, f), 1) for name, f in JOINED.items()},
    **{f"chain_{name}": (f, 1) for name, f in CHAINS.items()},
}
