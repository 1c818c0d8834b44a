"""Inverse of a unit lower triangular 64 x 64 tile, on tensor cores.

Recursive doubling: where X holds the inverses of the diagonal blocks of one size and E the entries that couple
neighbouring blocks, X - X E X holds those of twice the size (the block inverse [[P, 0], [Q, R]]^-1 =
[[P^-1, 0], [-R^-1 Q P^-1, R^-1]]). Blocks of two need no product, blocks up to 16 are four small problems side by
side, and two more levels join them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _coupling(o_row, o_col, level):
    """Entries that couple a block of 2^level rows with its left neighbour, below the diagonal."""
    return ((o_row >> (level + 1)) == (o_col >> (level + 1))) & ((o_row >> level) > (o_col >> level))


@triton.jit
def inverse(b_strict, PRECISION: tl.constexpr):
    """(I + b_strict)^-1 for b_strict [64, 64] float32, zero on and above the diagonal; PRECISION as in `tl.dot`."""
    o_i = tl.arange(0, 64)
    o_block = tl.arange(0, 4)
    b_own = o_block[:, None, None, None] == o_block[None, None, :, None]
    b_blocks = tl.sum(tl.where(b_own, tl.reshape(b_strict, [4, 16, 4, 16]), 0.0), axis=2)
    o_row = tl.arange(0, 16)[None, :, None]
    o_col = tl.arange(0, 16)[None, None, :]
    b_x = tl.where(o_row == o_col, 1.0, tl.where(_coupling(o_row, o_col, 0), -b_blocks, 0.0))
    for level in tl.static_range(1, 4):
        b_e = tl.where(_coupling(o_row, o_col, level), b_blocks, 0.0)
        b_x -= tl.dot(tl.dot(b_x, b_e, input_precision=PRECISION), b_x, input_precision=PRECISION)
    b_x = tl.reshape(tl.where(b_own, tl.reshape(b_x, [4, 16, 1, 16]), 0.0), [64, 64])
    for level in tl.static_range(4, 6):
        b_e = tl.where(_coupling(o_i[:, None], o_i[None, :], level), b_strict, 0.0)
        b_x -= tl.dot(tl.dot(b_x, b_e, input_precision=PRECISION), b_x, input_precision=PRECISION)
    return b_x
