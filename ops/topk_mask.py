"""Which entries of a row are among its k greatest: a selection without a sort.

    out[.., t] = x[.., t] is one of the k greatest of x[.., :]        k of them are True, in every row

as a sparse attention asks it of the scores of its indexer (DeepSeek-V3.2, arXiv:2512.02556, section 2.1). The order of
`torch.topk`: NaN is the greatest number, and both zeros are equal. Of entries that are equal to the k-th greatest,
those in front are taken; `torch.topk` leaves open which.

One pass over memory, one launch: every row is read once and stays in the registers of a program, which finds the k-th
greatest by counting. Results are exact and the same from run to run.

Dims: B batch, R rows, T entries of a row.

Launch parameters:
    warps: warps of a program, which holds a row.

Shape classes, by entries of a row:
    float32: scores of 32 bits.
    half: scores of 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusion_passes.arch import Architecture
from fusion_passes.fusion import dtype_name
from fusion_passes.lowering import (
    Launch,
    NotInlinable,
    Operand,
    Output,
    Size,
    Target,
    constant_or_argument,
    contiguous_strides,
    define,
    static,
)
from fusion_passes.ops._checks import FLOATS, typed
from fusion_passes.tuning import Complaint, Parameters, TunedTable

Tensor = torch.Tensor

SCHEMA = "(Tensor scores, int k, bool largest) -> Tensor"

# Entries of the longest row, which a program can hold in its registers.
LONGEST = 32768

# Entries that a thread holds at most.
MOST_HELD = 64

TABLE = TunedTable("topk_mask", Path(__file__).parent / "tuned" / "topk_mask.json", ("warps",))


# --- reference -------------------------------------------------------------------------------------------------------


def reference(scores: Tensor, k: int, largest: bool) -> Tensor:
    """The op in plain PyTorch; arguments as in `SCHEMA`."""
    order = scores.sort(dim=-1, descending=largest, stable=True).indices
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order[..., :k], True)


# --- launch ----------------------------------------------------------------------------------------------------------


def _complaint(parameters: Parameters, arch: Architecture, block: int) -> Complaint:
    threads = parameters["warps"] * arch.warp_size
    if threads > arch.max_threads:
        return f"{parameters['warps']} warps are {threads} threads, and a block of {arch.name} has {arch.max_threads}"
    if block > MOST_HELD * threads:
        return f"a thread would hold {block // threads} entries, and {MOST_HELD} fit in its registers"
    return None


def _fit(parameters: Parameters, arch: Architecture, block: int) -> Parameters:
    """A table entry for rows of up to `block` entries: no more threads than entries, or than a block of the GPU has."""
    most = max(1, min(block, arch.max_threads) // arch.warp_size)
    return {**parameters, "warps": min(parameters["warps"], most)}


def block_of(length: int) -> int:
    """The power of two of entries that a program holds for a row of this length."""
    return 1 << (length - 1).bit_length()


def parameters_for(arch: Architecture, dtype: torch.dtype, length: int) -> Parameters:
    """The launch parameters for rows of `length` entries.

    Raises:
        ValueError: parameters that the user forces cannot run; the message says why.
    """
    block = block_of(length)
    return TABLE.choose(
        arch, "float32" if dtype == torch.float32 else "half", length,
        fit=lambda p: _fit(p, arch, block),
        complaint=lambda p: _complaint(p, arch, block),
    )  # fmt: skip


def outer_axes(shape: Sequence[Any], strides: Sequence[Any]) -> list[tuple[Size, Size]]:
    """Length and stride of the axes before the last, those left out that have one entry or go on where the next ends.

    Symbolic sizes are compared as expressions, which adds no guard.
    """
    axes: list[tuple[Size, Size]] = []
    for length, stride in reversed(list(zip(shape[:-1], strides[:-1]))):
        if static(length) == 1:
            continue
        if axes and _same(stride, axes[-1][0] * axes[-1][1]):
            axes[-1] = (length * axes[-1][0], axes[-1][1])
        else:
            axes.append((length, stride))
    return axes[::-1]


def _same(left: Any, right: Any) -> bool:
    """Are two sizes equal whatever the symbols in them are?"""
    left, right = (size.node.expr if isinstance(size, torch.SymInt) else size for size in (left, right))
    return bool(left == right)


def plan(target: Target, scores: Operand, k: int, largest: bool) -> Launch:
    """The one launch that computes the op."""
    from fusion_passes.ops._topk_mask_kernel import topk_mask_kernel

    length, most = static(scores.shape[-1]), static(k)
    if length is None or most is None or static(scores.strides[-1]) is None:
        raise NotInlinable("k and the entries of a row must be known at compile time")
    axes = outer_axes(scores.shape, scores.strides)
    if len(axes) > 2:
        raise NotInlinable(f"rows lie at {len(axes)} strides as far as is known, and the kernel takes two")
    (batch, stride_b), (rows, stride_r) = ([(1, 0), (1, 0)] + axes)[-2:]
    block = block_of(length)
    use = parameters_for(target.arch, scores.dtype, length)
    one_stride = len(axes) < 2
    args: dict[str, Any] = {
        "x_ptr": scores.whole(),
        "out_ptr": Output(scores.shape, contiguous_strides(scores.shape), torch.bool),
        **constant_or_argument(target, "LENGTH", "length", length),
        **constant_or_argument(target, "K", "k", most),
        **constant_or_argument(target, "ROWS", "row_count", 0 if one_stride else rows, always=one_stride),
        **constant_or_argument(target, "X_B", "x_stride_b", stride_b, always=one_stride),
        **constant_or_argument(target, "X_R", "x_stride_r", stride_r, always=static(stride_r) == 0),
        "LARGEST": largest, "BLOCK": block, "PDL": target.arch.pdl,
    }  # fmt: skip
    return Launch(topk_mask_kernel, (batch * rows,), args, use["warps"])


# --- op --------------------------------------------------------------------------------------------------------------


def check_arguments(scores: Tensor, k: int) -> None:
    """Check what the op is given, values aside. Symbolic sizes are not compared: that would add a guard.

    Raises:
        TypeError: the scores have the wrong dtype.
        ValueError: a shape, a stride or k is wrong.
    """
    if scores.dtype not in FLOATS:
        raise TypeError(f"scores must be bfloat16, float16 or float32, got {dtype_name(scores.dtype)}")
    if scores.dim() == 0:
        raise ValueError("scores must be [.., T], got a tensor without axes")
    length, stride = scores.shape[-1], scores.stride(-1)
    if isinstance(length, int) and length > LONGEST:
        raise ValueError(f"scores must have rows of at most {LONGEST} entries, got {length}")
    if isinstance(k, int) and (k < 1 or isinstance(length, int) and k > length):
        raise ValueError(f"k must be from 1 to the {length} entries of a row, got {k}")
    if isinstance(stride, int) and stride != 1 and not (isinstance(length, int) and length == 1):
        raise ValueError(f"scores must have a last stride of 1, got strides {list(scores.stride())}: copy them first")
    axes = outer_axes(scores.shape, scores.stride())
    if len(axes) > 2 and all(isinstance(number, int) for axis in axes for number in axis):
        raise ValueError(
            f"scores must have rows at two strides at most, got shape {list(scores.shape)} with strides "
            f"{list(scores.stride())}: copy them first"
        )


def _fake(scores: Tensor, k: int, largest: bool) -> Tensor:
    check_arguments(scores, k)
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _cpu(scores: Tensor, k: int, largest: bool) -> Tensor:
    check_arguments(scores, k)
    return reference(scores, k, largest)


OP = define(
    "topk_mask",
    SCHEMA,
    reference=_cpu,
    fake=_fake,
    plan=plan,
    backward="topk_mask has no gradient: a selection has none. Call it under torch.no_grad(), or on scores.detach().",
    keep_stride_order=True,
)


@typed
def topk_mask(scores: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """Mark the k greatest entries of every row.

    Args:
        scores: [.., T] with T up to 32,768; bfloat16, float16 or float32. Fast, because nothing is copied first, where
            neighbouring entries of a row are neighbours in memory and the rows lie at one or two strides.
        k: entries to mark, from 1 to T.
        largest: False marks the k least.

    Returns:
        bool [.., T], contiguous, with k True in every row, and without a gradient. NaN counts as the greatest number.
        Of entries that are equal to the k-th, those in front are marked.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what it must be.
    """
    if scores.dim() and (scores.stride(-1) != 1 or len(outer_axes(scores.shape, scores.stride())) > 2):
        scores = scores.contiguous()
    return torch.ops.fusion_passes.topk_mask(scores, k, largest)


# --- benchmark cases -------------------------------------------------------------------------------------------------


def cases() -> list[Any]:
    """What the op is benchmarked on, a list of `fusion_passes.benchmarking.Case`."""
    from fusion_passes.ops import _topk_mask_cases

    return _topk_mask_cases.cases()
