"""Scores of a sparse-attention indexer: how much a key matters to a query, over all heads at once.

    I[b, s, t] = scale * sum over h of w[b, s, h] * relu(q[b, s, h, :] . k[b, t, :])

the lightning indexer of DeepSeek-V3.2 (arXiv:2512.02556, equation 1), with a mask on top. k is shared by all heads; w
may have either sign. The products per head, [S, H, T], never leave the chip.

Numerics. Sums are float32. Products of bfloat16, float16 or float8_e4m3fn operands are exact on tensor cores, but those
of sm_90 align the products of float8 to fewer bits than float32 has when they add them up. float32 operands take three
TF32 products unless `precision` allows less. A q_scale or k_scale multiplies the products before the relu, as it would
in dequantised operands; with `scale_after` k_scale multiplies the scores, which costs less and is the same where it is
not negative. NaN passes the relu if `keep_nan`, else it counts as 0, as in `where(x > 0, x, 0)`.

Masks. "keep" and "drop" put `fill` in the place of hidden scores. "add" adds the mask to the scores; where it is
-3e38 or less the key counts as hidden, and a block of hidden keys holds the mask alone: the same as the sum unless the
score is NaN, +inf or beyond 1e31. "causal" hides t > s + causal_offset without a mask in memory. Blocks
that are hidden entirely cost no product.

Dims: B batch, S queries, T keys, H heads, D channels.

Launch parameters:
    keys: keys of a program, which it keeps on the chip.
    queries: queries of a program.
    columns: queries times heads of one matrix product, where a program walks over its queries; 0 where it walks over
        the heads, with all its queries in one product.
    warps: warps of a program.
    stages: stages of the software pipeline that loads queries ahead.

Shape classes, by queries of a sequence:
    half: bfloat16 and float16.
    float8: float8_e4m3fn.
    single: float32.
    half_decode, float8_decode, single_decode: likewise, up to 16 queries.
"""

from __future__ import annotations

from typing import Any

import torch

from fusion_passes.lowering import define
from fusion_passes.ops._checks import typed
from fusion_passes.ops._index_score_checks import check_arguments
from fusion_passes.ops._index_score_launch import plan, unsupported

__all__ = ["OP", "SCHEMA", "cases", "index_score", "plan", "reference", "unsupported"]

Tensor = torch.Tensor

SCHEMA = (
    "(Tensor q, Tensor k, Tensor w, Tensor? q_scale, Tensor? k_scale, Tensor? mask, str mask_kind, "
    "SymInt causal_offset, float scale, float fill, bool keep_nan, bool scale_after, str precision, "
    "ScalarType dtype, str layout) -> Tensor"
)


# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    q: Tensor, k: Tensor, w: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, mask: Tensor | None,
    mask_kind: str, causal_offset: int, scale: float, fill: float, keep_nan: bool, scale_after: bool, precision: str,
    dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch; arguments as in `SCHEMA`, see `index_score`. float64 operands give a float64 result."""
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    products = torch.einsum("bshd,btd->bsht", q.to(wide), k.to(wide))
    if q_scale is not None:
        products = products * q_scale.to(wide).unsqueeze(-1)
    if k_scale is not None and not scale_after:
        products = products * k_scale.to(wide)[:, None, None]
    products = products.relu() if keep_nan else torch.where(products > 0, products, 0.0)
    scores = torch.einsum("bsht,bsh->bst", products, w.to(wide)) * scale
    if k_scale is not None and scale_after:
        scores = scores * k_scale.to(wide)[:, None]
    if mask_kind == "add":
        assert mask is not None
        scores = scores + mask.to(wide)
    elif mask_kind != "none":
        hidden = mask if mask is not None else _causal(scores, causal_offset)
        scores = scores.masked_fill(~hidden if mask_kind == "keep" else hidden, fill)
    scores = scores if wide == torch.float64 else scores.to(dtype)
    return scores.permute(["bst".index(axis) for axis in layout]).contiguous()


def _causal(scores: Tensor, offset: int) -> Tensor:
    """True where a key lies behind its query: [S, T]."""
    s, t = (torch.arange(n, device=scores.device) for n in scores.shape[1:])
    return t > s[:, None] + offset


# --- op --------------------------------------------------------------------------------------------------------------


def _fake(
    q: Tensor, k: Tensor, w: Tensor, q_scale: Tensor | None, k_scale: Tensor | None, mask: Tensor | None,
    mask_kind: str, causal_offset: int, scale: float, fill: float, keep_nan: bool, scale_after: bool, precision: str,
    dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    check_arguments(q, k, w, q_scale, k_scale, mask, mask_kind, scale, fill, precision, dtype, layout)
    extents = {"b": q.shape[0], "s": q.shape[1], "t": k.shape[1]}
    return q.new_empty([extents[axis] for axis in layout], dtype=dtype)


def _cpu(*args: Any) -> Tensor:
    _fake(*args)
    return reference(*args)


OP = define(
    "index_score",
    SCHEMA,
    reference=_cpu,
    fake=_fake,
    plan=plan,
    backward="index_score has no gradient: it selects keys. Call it under torch.no_grad(), or compute the scores with "
    "torch.matmul and torch.relu where q, k or w requires a gradient.",
    keep_stride_order=True,
)


@typed
def index_score(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    fill: float = float("-inf"),
    causal_offset: int | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    scale_after: bool = False,
    precision: str = "tf32x3",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Index scores: the formula at the top of this module.

    Args:
        q: [B, S, H, D] or [S, H, D]; bfloat16, float16, float32 or float8_e4m3fn; any strides whose last is 1. Up to
            128 heads; D a multiple of 8 from 16 to 256.
        k: [B, T, D] or [T, D], likewise.
        w: [B, S, H] or [S, H]; bfloat16, float16 or float32; any strides.
        scale: a positive factor.
        mask: broadcasts to [B, S, T]: bool, True where a key is seen, or a float that is added.
        fill: the score of keys that a bool mask or causal_offset hides.
        causal_offset: in place of a mask, query s sees the keys t <= s + causal_offset; T - S where the last query sees
            all keys.
        q_scale, k_scale: [B, S, H] and [B, T] (or without B): factors of the rows of q and k, for float8.
        scale_after: k_scale multiplies the scores; faster, and the same where k_scale is not negative.
        precision: of float32 products: "ieee", "tf32x3" (three TF32 products, as good) or "tf32".
        dtype: of the result.

    Returns:
        [B, S, T] or [S, T].

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message says what it is
            and what it must be.
        NotImplementedError: the GPU has no float8 products or too little shared memory for the heads, or a backward
            pass reaches the op.
    """
    if q.dim() not in (3, 4):
        raise ValueError(f"q must be [B, S, H, D] or [S, H, D], got shape {list(q.shape)}")
    if mask is not None and causal_offset is not None:
        raise ValueError("mask and causal_offset exclude one another; give the mask alone")
    single = q.dim() == 3
    if single:
        q, k, w = (t.unsqueeze(0) for t in (q, k, w))
        q_scale, k_scale = (None if t is None else t.unsqueeze(0) for t in (q_scale, k_scale))
    shape = (q.shape[0], q.shape[1], k.shape[1] if k.dim() == 3 else 0)
    kind = "none" if causal_offset is None else "causal"
    if mask is not None:
        kind = "keep" if mask.dtype == torch.bool else "add"
        try:
            mask = mask.expand(shape)
        except RuntimeError:
            found = list(mask.shape)
            raise ValueError(f"mask must broadcast to [B, S, T] = {list(shape)}, got shape {found}") from None
    scores = OP(
        q, k, w, q_scale, k_scale, mask, kind, causal_offset or 0, scale, fill, True, scale_after, precision, dtype,
        "bst",
    )  # fmt: skip
    return scores.squeeze(0) if single else scores


# --- benchmark cases -------------------------------------------------------------------------------------------------


def cases() -> list[Any]:
    """What the op is benchmarked on, a list of `fusion_passes.benchmarking.Case`."""
    from fusion_passes.ops import _index_score_cases

    return _index_score_cases.cases()
