"""Matrix products padded by hand as Inductor's `pad_mm` pads them."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def padded(a: Tensor, b: Tensor, multiple: int = 8) -> Tensor:
    """a @ b, for matrices or batches of them: sizes filled up with zeros, and the result cut."""
    rows, inner, columns = (-n % multiple if n > 1 else 0 for n in (*a.shape[-2:], b.shape[-1]))
    batches = [0, 0] if a.dim() == 3 else []
    if rows or inner:
        a = aten.constant_pad_nd.default(a, [0, inner, 0, rows, *batches])
    if inner or columns:
        b = aten.constant_pad_nd.default(b, [0, columns, 0, inner, *batches])
    out = (aten.bmm if batches else aten.mm).default(a, b)
    out = aten.slice.Tensor(out, -2, 0, -rows) if rows else out
    return aten.slice.Tensor(out, -1, 0, -columns) if columns else out


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """A head gate of [T, K] and [H, K] by a padded product."""
    return padded(x, weight.t()) * 0.25


def scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """Index scores of [S, H, D], [T, D] and [S, H] by two padded products; nothing follows the second one."""
    keys = k.t().expand(q.shape[0], -1, -1)
    return padded(w.unsqueeze(1), padded(q, keys).relu()).squeeze(1)
