"""What a spelling of the MLA key and value means: sizes, inputs, and the result element by element.

    K[b, t, h] = cast(steps_k([k_nope[b, t, h] | k_pe[b, t]]))      V[b, t, h] = cast(steps_v(v[b, t, h]))

with k_nope and v the first NOPE and the last V columns of each head of x @ w.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support import entries

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
TOKENS, HEADS, NOPE, PE, V = 6, 4, 16, 8, 16
HEAD = NOPE + V
SCALE = 2.5

Steps = Callable[[Tensor], Tensor]


def plain(value: Tensor) -> Tensor:
    return value


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of a spelling and what it computes from them.

    Attributes:
        batch: number of batches; None where x and k_pe have no such axis.
        scales: how many scales follow x, w and k_pe.
        k, v: steps before the cast in float32; v is None where there is only a key.
        dtype: of the result.
        head_first: tokens lie inside of heads in the result, [.., H, T, D].
        pe_first: k_pe comes first.
        flat: heads and columns are one axis of the result.
        apart: the lengths of x and k_pe are unrelated symbols where sizes are dynamic.
        loose: eager rounds an intermediate that the compiled graph does not; results differ by one float8 step.
    """

    batch: int | None = None
    scales: int = 0
    k: Steps = plain
    v: Steps | None = plain
    dtype: torch.dtype = E4
    v_dtype: torch.dtype | None = None
    head_first: bool = False
    v_head_first: bool | None = None
    pe_first: bool = False
    flat: bool = False
    loose: bool = False
    apart: bool = False
    pe_shape: str = "tr"
    amplitude: float = 1.0
    float_dtype: torch.dtype = torch.bfloat16

    def inputs(self, seed: int = 0, tokens: int = TOKENS) -> tuple[Tensor, ...]:
        """x [(B,) T, 24], w [24, H * HEAD], k_pe as `pe_shape` says, scales of one element."""
        generator = torch.Generator().manual_seed(seed)
        lead = (tokens,) if self.batch is None else (self.batch, tokens)
        x = torch.randn(*lead, 24, generator=generator) * self.amplitude
        w = torch.randn(24, HEADS * HEAD, generator=generator)
        pe = torch.randn(*lead, PE, generator=generator) * 3
        if self.pe_shape == "t1r":
            pe = pe.unsqueeze(-2)
        elif self.pe_shape == "1tr":
            pe = pe.unsqueeze(-3)
        elif self.pe_shape == "thr":
            pe = pe.unsqueeze(-2).to(self.float_dtype).expand(*lead, HEADS, PE)
        scales = [torch.tensor(SCALE), torch.tensor(0.75)][: self.scales]
        return (x.to(self.float_dtype), w.to(self.float_dtype), pe.to(self.float_dtype), *scales)

    def meaning(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The result, or results, in the layout of the case."""
        x, w, pe = inputs[:3]
        tokens = x.shape[:-1]
        kv = (x @ w).view(*tokens, HEADS, HEAD).float()
        shared = pe.float().reshape(*tokens, -1, PE).expand(*tokens, HEADS, PE)
        parts = [shared, kv[..., :NOPE]] if self.pe_first else [kv[..., :NOPE], shared]
        results = [self._finished(self.k(torch.cat(parts, -1)), self.dtype, self.head_first)]
        if self.v is not None:
            first = self.head_first if self.v_head_first is None else self.v_head_first
            results.append(self._finished(self.v(kv[..., NOPE:]), self.v_dtype or self.dtype, first))
        return results

    def _finished(self, value: Tensor, dtype: torch.dtype, head_first: bool) -> Tensor:
        limits = torch.finfo(dtype)
        value = value.clamp(limits.min, limits.max).to(dtype)
        value = value.transpose(-3, -2) if head_first else value
        return value.flatten(-2) if self.flat else value


Entry = entries.Entry[Case]
Table = dict[str, Entry]
entry = functools.partial(entries.entry, Case)


def codes(value: Tensor) -> Tensor:
    """Float8 numbers as integers in the order of their values, so that neighbours differ by one."""
    bits = value.contiguous().view(torch.uint8).int()
    return torch.where(bits >= 128, 127 - bits, bits)


def assert_same_bytes(actual: Any, expected: Any, loose: bool = False) -> None:
    """Equal bit for bit; with `loose` a sixth of the elements may be off by one float8 step."""
    actual = [actual] if isinstance(actual, Tensor) else list(actual)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        if b.numel() == 0:
            continue
        if b.dtype not in (E4, E5):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            continue
        difference = (codes(a) - codes(b)).abs()
        largest, share = int(difference.max()), float((difference > 0).float().mean())
        assert largest <= int(loose) and share <= 1 / 6 * loose, f"{share:.1%} differ, by up to {largest} steps"
