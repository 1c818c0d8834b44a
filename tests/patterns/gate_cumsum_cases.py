"""What a spelling of the gate-then-cumsum means: sizes, inputs, and a float64 loop over tokens.

The meaning, with one running sum per chunk of C tokens:

    c[b, t, h, k] = s * sum over t' <= t in the chunk of t of g[b, t', h, k]
    softplus gate: g = -exp(A_log[h]) * log(1 + exp(raw + bias))
    bounded gate:  g = lower * sigmoid(exp(A_log[h]) * (raw + bias))

Axes are written as letters: b batch, n chunk, c token in its chunk, h head, k channel, t = (n c), d = (h k),
z = (b h), y = (b n), x = (h n), w = (b h n), 1 a unit axis. A letter may be left out where its size is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MERGED = {"t": "nc", "d": "hk", "z": "bh", "y": "bn", "x": "hn", "w": "bhn"}


def arrange(value: Tensor, layout: str, chunk: int | None = None) -> Tensor:
    """[B, T, H, K] in the order of `layout`, materialised; without `chunk` all tokens are one chunk."""
    batch, tokens, heads, channels = value.shape
    chunk = tokens if chunk is None else chunk
    size = {"b": batch, "n": tokens // chunk, "c": chunk, "h": heads, "k": channels}
    atoms = "".join(MERGED.get(letter, letter) for letter in layout if letter != "1")
    left_out = [letter for letter in "bnchk" if letter not in atoms]
    assert all(size[letter] == 1 for letter in left_out), f"{layout} drops an axis that is not of size one"
    order = ["bnchk".index(letter) for letter in [*atoms, *left_out]]
    shape = []
    for letter in layout:
        extent = 1
        for atom in MERGED.get(letter, letter):
            extent *= size.get(atom, 1)
        shape.append(extent)
    return value.reshape(batch, tokens // chunk, chunk, heads, channels).permute(order).reshape(shape).contiguous()


class Draw(NamedTuple):
    """Values in canonical form: raw [B, T, H, K], A_log [1, 1, H, 1], bias [1, 1, H, K] or None."""

    raw: Tensor
    A_log: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Case:
    """Sizes, dtypes and layouts of one spelling; `pack` builds the first argument where it is not `raw` alone."""

    tokens: int = 128
    channels: int = 64
    heads: int = 2
    batch: int = 2
    chunk: int = 64
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    bias: str | None = "d"
    rate: str = "h"
    raw: str = "btd"
    out: str = "bhnck"
    lower: float | None = None
    scale: float = 1.0
    outliers: bool = True
    pack: Callable[[Tensor], Tensor] | None = None
    extra: Callable[[], tuple[Any, ...]] | None = None
    seed: int = 0

    def draw(self) -> Draw:
        generator = torch.Generator().manual_seed(self.seed)
        raw = torch.randn(self.batch, self.tokens, self.heads, self.channels, generator=generator) * 3
        if self.outliers:  # both sides of a threshold at 20
            far = torch.rand(raw.shape, generator=generator)
            raw = torch.where(far < 0.02, raw + 24, torch.where(far > 0.98, raw - 24, raw))
        low, high = (1.0, 16.0) if self.lower is None else (0.5, 2.0)
        rate = torch.empty(1, 1, self.heads, 1).uniform_(low, high, generator=generator)
        bias = torch.randn(1, 1, self.heads, self.channels, generator=generator)
        parameter = None if self.bias is None else bias.to(self.parameter_dtype)
        return Draw(raw.to(self.dtype), rate.log().to(self.parameter_dtype), parameter)

    def inputs(self) -> tuple[Any, ...]:
        """Arguments of the function: raw (or what holds it), A_log, bias unless there is none, the extra ones."""
        raw, A_log, bias = self.draw()
        first = arrange(raw, self.raw) if self.pack is None else self.pack(raw)
        biases = () if bias is None or self.bias is None else (arrange(bias, self.bias),)
        return (first, arrange(A_log, self.rate), *biases, *(self.extra() if self.extra else ()))

    def meaning(self) -> Tensor:
        """The result in float64, in the layout `out`; rows past the last token carry the running value."""
        raw, A_log, bias = self.draw()
        pre = raw.double() + (0.0 if bias is None else bias.double())
        rate = A_log.double().exp()
        if self.lower is None:
            gate = -rate * torch.logaddexp(pre, torch.zeros((), dtype=torch.float64))
        else:
            gate = self.lower / (1.0 + torch.exp(-rate * pre))
        padded = -(-self.tokens // self.chunk) * self.chunk
        rows = []
        running = torch.zeros_like(gate[:, 0])
        for token in range(padded):
            if token % self.chunk == 0:
                running = torch.zeros_like(running)
            if token < self.tokens:
                running = running + gate[:, token]
            rows.append(self.scale * running)
        return arrange(torch.stack(rows, 1), self.out, self.chunk)


class Entry(NamedTuple):
    """One function with its example inputs, the case it means (or resembles), and how it differs from that.

    `differs`: "" equal to the meaning; "value", "rounding", "dtype" or "shape" for results that differ in that;
    "escape" and "size" for the right values that may still not be replaced.
    """

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    case: Case
    differs: str = ""

    @property
    def about(self) -> str:
        return (self.function.__doc__ or "").strip()


Table = dict[str, Entry]
Function = Callable[..., Any]


def entry(table: Table, case: Case, differs: str = "") -> Callable[[Function], Function]:
    """Put the decorated function in `table` under its own name."""

    def put(function: Function) -> Function:
        name = function.__name__
        assert name not in table, f"two entries named {name}"
        table[name] = Entry(function, case.inputs, case, differs)
        return function

    return put
