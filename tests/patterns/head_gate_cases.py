"""What a spelling of a head gate means: sizes, inputs, and the result element by element."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from tests.support import entries

BATCH, TOKENS, HEADS, COLUMNS, DIM = 2, 5, 8, 256, 128
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of a spelling, x, weight and perhaps q, and what it computes from them.

    Attributes:
        scale: the constant factor.
        weights: dtype of the weights.
        rows: dtype of x.
        q: shape of the scales from the letters b, t, h and 1; "" for none.
        q_dtype: their dtype.
        flat: x is [B * T, K].
        batch: number of batches.
        tokens: of each.
        result: shape of the result, as for q.
        dtype: of the result.
        static: the spelling fixes the number of tokens.
    """

    scale: float = HEADS**-0.5
    weights: torch.dtype = BF16
    rows: torch.dtype = BF16
    q: str = ""
    q_dtype: torch.dtype = F32
    flat: bool = False
    batch: int = BATCH
    tokens: int = TOKENS
    result: str = "bth"
    dtype: torch.dtype = F32
    static: bool = False

    def shape(self, letters: str, tokens: int) -> list[int]:
        sizes = {"b": self.batch, "t": tokens, "h": HEADS, "1": 1, "r": self.batch * tokens}
        return [sizes[letter] for letter in letters]

    def inputs(self, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, ...]:
        """x [B, T, K] (or flat), weight [H, K], q."""
        tokens = self.tokens if tokens is None else tokens
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, tokens, COLUMNS, generator=generator).to(self.rows)
        weight = (torch.randn(HEADS, COLUMNS, generator=generator) * COLUMNS**-0.5).to(self.weights)
        found = (x.flatten(0, 1) if self.flat else x, weight)
        if not self.q:
            return found
        return (*found, (torch.rand(self.shape(self.q, tokens), generator=generator) + 0.25).to(self.q_dtype))

    def meaning(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The result in float64, but for the rounding of a 16-bit product."""
        x, weight = inputs[:2]
        x = x.reshape(self.batch, -1, COLUMNS)
        product = torch.einsum("btk,hk->bth", x.double(), weight.double())
        out = product * self.scale
        if self.q:
            scales = inputs[2].double()
            letters = "bt" if self.q.startswith("b") else "t" if self.q.startswith("t") else ""
            wide = scales.reshape(*self.shape(letters, x.shape[1]), -1) if "r" not in self.q else scales.view_as(out)
            out = out * wide
        if "h" in self.result and self.result.index("h") < max(self.result.find("t"), self.result.find("r")):
            out = out.transpose(1, 2)
        return out.reshape(self.shape(self.result, x.shape[1]))


Entry = entries.Entry[Case]
Table = dict[str, Entry]
entry = functools.partial(entries.entry, Case)


def assert_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype, rounded: bool) -> None:
    """The L2 error of a result is that of its roundings."""
    assert actual.dtype == dtype and actual.shape == wanted.shape, (actual.dtype, actual.shape, wanted.shape)
    error = float((actual.double() - wanted).norm() / wanted.norm())
    assert error <= (5e-3 if rounded or dtype != F32 else 2e-6), error
