"""The table of copies that stock keeps, as small functions over inputs of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Row:
    """One form of in-place code.

    Attributes:
        function: writes into its inputs and perhaps returns something.
        inputs: which inputs it takes, see `make`.
        sites: how many sites are found.
        moved: bytes that Inductor's kernels move after the pass; library calls and kernels of our own are not counted.
        launches: kernels after the pass.
        extra: bytes that stock's kernels move beyond that, at least; 0 where there is nothing to win.
        own: bytes that a kernel of our own moves after the pass.
    """

    function: Callable[..., Any]
    inputs: str
    sites: int
    moved: Callable[[Dims], int]
    launches: int
    extra: Callable[[Dims], int]
    own: Callable[[Dims], int] = lambda dims: 0


@dataclasses.dataclass(frozen=True)
class Dims:
    """Tokens, heads, channels per head, positions of a cache; the elements of a cache row are the channels."""

    tokens: int = 2048
    heads: int = 64
    channels: int = 128
    cache: int = 131072

    @property
    def query(self) -> int:
        """Bytes of a query in bfloat16."""
        return 2 * self.tokens * self.heads * self.channels

    @property
    def key(self) -> int:
        """Bytes of the rows that one write puts into a cache."""
        return 2 * self.tokens * self.channels

    @property
    def whole(self) -> int:
        """Bytes of a cache."""
        return 2 * self.cache * self.channels


def make(inputs: str, dims: Dims, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Random inputs, one for each letter: q(uery), r (key to be rotated), x and w (of a product), c(ache), s(tacked
    caches), k(ey), v(alue), i(ndices), a (cosines) and b (sines)."""
    t, h, d, n = dims.tokens, dims.heads, dims.channels, dims.cache
    shapes = {
        "q": (t, h, d), "r": (t, 1, d), "x": (t, 128), "w": (h * d, 128),
        "c": (n, d), "s": (2, n, d), "k": (t, d), "v": (t, d), "a": (t, 1, d // 4), "b": (t, 1, d // 4),
    }  # fmt: skip
    generator = torch.Generator(device=device).manual_seed(0)
    made = []
    for letter in inputs:
        if letter == "i":
            made.append(torch.randperm(n, generator=generator, device=device)[:t])
        else:
            made.append(torch.randn(shapes[letter], generator=generator, device=device).to(dtype))
    return made


@torch.library.custom_op("fusion_passes_tests::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    """Stands for a kernel that works in place."""
    x.mul_(2)


def project(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w.t()).view(x.shape[0], -1, 128)


def slice_back(q: Tensor) -> Tensor:
    q[..., :64] = q[..., :64]
    return q * 2


def slice_copied_back(q: Tensor) -> Tensor:
    q[..., :64].copy_(q[..., :64])
    return q * 2


def back_after_kernel(x: Tensor, w: Tensor) -> Tensor:
    q = project(x, w)
    part = q[..., :64]
    double_(part)
    q[..., :64].copy_(part)
    return q


def both_back_after_kernel(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    query, key = project(x, w), project(x, w + 1)
    for tensor in (query, key):
        part = tensor[..., :64]
        double_(part)
        tensor[..., :64] = part
    return query, key


def halves_joined(x: Tensor, w: Tensor) -> Tensor:
    q = project(x, w)
    return torch.cat([q[..., :64], q[..., 64:]], -1)


def chunks_joined(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat(project(x, w).chunk(4, -1), -1)


def split_joined(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat(project(x, w).split([32, 96], -1), -1)


def clone_written(q: Tensor, k: Tensor) -> Tensor:
    y = q.clone()
    y[..., :64] = k[:, None, :64]
    return y


def two_slices(c: Tensor, k: Tensor, v: Tensor) -> None:
    c[: k.shape[0]] = k
    c[k.shape[0] : 2 * k.shape[0]] = v


def stacked(s: Tensor, k: Tensor, v: Tensor) -> None:
    s[0, 5 : 5 + k.shape[0]] = k
    s[1, 5 : 5 + k.shape[0]] = v


def slice_and_index(c: Tensor, k: Tensor, v: Tensor, i: Tensor) -> None:
    c[: k.shape[0]] = k
    c.index_put_((i,), v)


def stacked_by_index(s: Tensor, k: Tensor, v: Tensor, i: Tensor) -> None:
    s[0].index_put_((i,), k)
    s[1].index_put_((i,), v)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotated_input(q: Tensor, a: Tensor, b: Tensor) -> None:
    q[..., :64] = rope(q[..., :64], a, b)


def rotated_inputs(q: Tensor, r: Tensor, a: Tensor, b: Tensor) -> None:
    q[..., :64] = rope(q[..., :64], a, b)
    r[..., :64] = rope(r[..., :64], a, b)


def rotated_product(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    q = project(x, w)
    q[..., :64] = rope(q[..., :64], a, b)
    return q


def rotated_by_halves(q: Tensor, a: Tensor, b: Tensor) -> None:
    first, second = q[..., :32].clone(), q[..., 32:64].clone()
    q[..., :32] = first * a - second * b
    q[..., 32:64] = second * a + first * b


def _none(dims: Dims) -> int:
    return 0


def _half(dims: Dims) -> int:
    """Half of a query's channels, read and written."""
    return dims.query


def _indices(dims: Dims) -> int:
    return 8 * dims.tokens


ROWS: dict[str, Row] = {
    "R2 rope of an input": Row(rotated_input, "qab", 1, _none, 1, lambda d: 2 * d.query, _half),
    "R3 rope of a product": Row(rotated_product, "xwab", 1, _none, 1, lambda d: 2 * d.query, _half),
    "R5 rope by halves": Row(rotated_by_halves, "qab", 1, _none, 1, lambda d: 3 * d.query, _half),
    "R7 rope of two inputs": Row(
        rotated_inputs, "qrab", 2, _none, 2, lambda d: 2 * d.query, lambda d: _half(d) + d.key
    ),
    "I1 slice = itself": Row(slice_back, "q", 1, lambda d: 2 * d.query, 1, lambda d: d.query // 2),
    "I2 slice.copy_(itself)": Row(slice_copied_back, "q", 1, lambda d: 2 * d.query, 1, lambda d: d.query // 2),
    "I3 cat(split)": Row(split_joined, "xw", 1, _none, 0, _none),
    "I4 cat(slices)": Row(halves_joined, "xw", 1, _none, 0, lambda d: 2 * d.query),
    "I5 cat(chunks)": Row(chunks_joined, "xw", 1, _none, 0, lambda d: 2 * d.query),
    "M3 kernel, then copy_": Row(back_after_kernel, "xw", 1, _none, 0, lambda d: d.query),
    "M4 same, two tensors": Row(
        both_back_after_kernel, "xw", 2, lambda d: 4 * d.heads * d.channels * 128, 1, lambda d: 2 * d.query
    ),
    "K7 two slices": Row(two_slices, "ckv", 1, lambda d: 4 * d.key, 2, lambda d: 2 * d.whole - 2 * d.key),
    "K8 stacked": Row(stacked, "skv", 1, lambda d: 4 * d.key, 2, lambda d: 4 * d.whole),
    "K6 slice and index": Row(slice_and_index, "ckvi", 1, lambda d: 4 * d.key + _indices(d), 2, lambda d: 3 * d.whole),
    "K10 stacked by index": Row(
        stacked_by_index, "skvi", 1, lambda d: 4 * d.key + 2 * _indices(d), 2, lambda d: 8 * d.whole
    ),
    "I9 clone, then slice": Row(clone_written, "qk", 0, lambda d: 2 * d.query, 1, _none),
}
