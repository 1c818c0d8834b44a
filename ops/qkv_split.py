"""Windows of one matrix, each copied to a contiguous tensor of its own, in one launch.

    out_i[b, t, h * R_i + r, k] = x[b, t, start_i + h * K_i + k]        r < R_i

x is what a projection or a convolution over time gives to an attention layer: queries, keys and values next to each
other. Window i has H_i heads of K_i channels and is repeated R_i times within each head (grouped-query attention);
the windows follow each other without gaps and cover x. Heads may come before tokens in the results.

One pass over memory. Values are moved, not computed: results are equal to the input bit by bit.

Dims: B batch, T tokens, D columns, H heads, R repeats, K channels of a head.

Launch parameters:
    rows: tokens of a tile.
    lanes: columns of a tile.
    warps: warps of a program.

Shape classes, by elements of `x`:
    rows: neighbouring columns are neighbours in memory.
    transposed: neighbouring tokens are.
    unaligned: likewise, and columns do not begin at multiples of 16 bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusion_passes.arch import Architecture
from fusion_passes.lowering import (
    Launch,
    Operand,
    Output,
    Program,
    Size,
    Target,
    cdiv,
    constant_or_argument,
    contiguous_strides,
    define,
    static,
)
from fusion_passes.ops._checks import FLOATS, typed
from fusion_passes.tuning import Complaint, Parameters, TunedTable

Tensor = torch.Tensor

SCHEMA = "(Tensor x, int[] heads, int[] dims, int[] repeats, bool head_major) -> Tensor[]"

# Windows begin and end at multiples of 16 bytes in every dtype that the op takes.
GRANULE = 8

TABLE = TunedTable(
    "qkv_split", Path(__file__).parent / "tuned" / "qkv_split.json", ("rows", "lanes", "warps")
)  # fmt: skip


# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor, heads: Sequence[int], dims: Sequence[int], repeats: Sequence[int], head_major: bool
) -> list[Tensor]:
    """The op in plain PyTorch; arguments as in `SCHEMA`, see `qkv_split` for their meaning."""
    found = []
    for window, count, dim, times in zip(x.split([h * k for h, k in zip(heads, dims)], -1), heads, dims, repeats):
        repeated = window.unflatten(-1, (count, 1, dim)).expand(-1, -1, -1, times, -1)
        order = (0, 2, 3, 1, 4) if head_major else (0, 1, 2, 3, 4)
        moved = repeated.permute(order).clone(memory_format=torch.contiguous_format)
        found.append(moved.flatten(1, 2) if head_major else moved.flatten(2, 3))
    return found


# --- launch ----------------------------------------------------------------------------------------------------------


def _complaint(parameters: Parameters, arch: Architecture, itemsize: int, transposed: bool) -> Complaint:
    threads = parameters["warps"] * arch.warp_size
    if threads > arch.max_threads:
        return f"{parameters['warps']} warps are {threads} threads, and a block of {arch.name} has {arch.max_threads}"
    if parameters["lanes"] < GRANULE:
        return f"lanes={parameters['lanes']} is less than the {GRANULE} columns that are moved together"
    tile = parameters["rows"] * parameters["lanes"]
    if tile * itemsize // threads > 512:
        return f"a thread would hold {tile * itemsize // threads} bytes, and 512 fit in its registers"
    if transposed and tile * itemsize > arch.shared_memory:
        return f"a tile takes {tile * itemsize} bytes, and a block of {arch.name} has {arch.shared_memory} to share"
    return None


def _fit(parameters: Parameters, widths: Sequence[int], transposed: bool) -> Parameters:
    """A table entry for these widths: lanes that divide all of them where that leaves 64 or more, no idle ones.

    A plain copy takes as many more rows as it takes fewer lanes; a transposed tile needs both sides long as they are.
    """
    lanes = min(parameters["lanes"], 1 << (max(widths) - 1).bit_length())
    divisor = min(width & -width for width in widths)
    if lanes > divisor >= 64:
        lanes = divisor
    rows = parameters["rows"] * (1 if transposed else parameters["lanes"] // lanes)
    return {**parameters, "rows": rows, "lanes": lanes}


def parameters_for(
    arch: Architecture, shape_class: str, elements: int, widths: Sequence[int], itemsize: int
) -> Parameters:
    """The launch parameters for a shape; `elements` is the size of x.

    Args:
        arch: the GPU.
        shape_class: "rows" (neighbouring columns are neighbours in memory), "transposed" (neighbouring tokens are) or
            "unaligned" (likewise, and columns do not begin at multiples of 16 bytes).
        elements: number of elements of x.
        widths: columns of each window.
        itemsize: bytes of an element.

    Raises:
        ValueError: parameters that the user forces cannot run; the message says why.
    """
    return TABLE.choose(
        arch, shape_class, elements,
        fit=lambda p: _fit(p, widths, shape_class != "rows"),
        complaint=lambda p: _complaint(p, arch, itemsize, shape_class != "rows"),
    )  # fmt: skip


def _addressing(x: Operand, head_major: bool) -> tuple[Size, Size, tuple[Size, Size, Size]]:
    """Batch, tokens, and the strides of x; strides of axes of length one mean nothing and count as 0 (or 1).

    Results with tokens before heads do not tell batch from tokens: both are one axis where memory allows.
    """
    (batch, tokens, _), (x_batch, x_token, x_column) = x.shape, x.strides
    if static(batch) == 1:
        x_batch = 0
    elif not head_major and (static(tokens) == 1 or x_batch == tokens * x_token):
        x_token = x_batch if static(tokens) == 1 else x_token
        return 1, batch * tokens, (0, x_token, x_column)
    if static(tokens) == 1:
        x_token = 0
    return batch, tokens, (x_batch, x_token, x_column)


def _numbers(target: Target, x: Operand, tokens: Size, strides: tuple[Size, Size, Size]) -> dict[str, Any]:
    """Strides, offset and tokens, each as a constant of the kernel or as a run-time argument."""
    x_batch, x_token, x_column = strides
    row_major = static(x_column) == 1
    return {
        **constant_or_argument(target, "OFFSET", "x_offset", x.offset, always=True),
        **constant_or_argument(target, "TOKENS", "token_count", tokens),
        **constant_or_argument(target, "X_B", "x_stride_b", x_batch, always=static(x_batch) == 0),
        **constant_or_argument(target, "X_T", "x_stride_t", x_token, always=row_major or static(x_token) == 1),
        **constant_or_argument(target, "X_D", "x_stride_d", x_column, always=row_major),
    }


def plan(
    target: Target, x: Operand, heads: Sequence[int], dims: Sequence[int], repeats: Sequence[int], head_major: bool
) -> Program:
    """One launch of `qkv_split_kernel` for every `MOST_WINDOWS` windows."""
    from fusion_passes.ops._qkv_split_kernel import MOST_WINDOWS, qkv_split_kernel

    batch, tokens, strides = _addressing(x, head_major)
    widths = [h * k for h, k in zip(heads, dims)]
    vector = 16 // x.dtype.itemsize
    transposed = static(strides[1]) == 1 and static(strides[2]) != 1
    unaligned = transposed and target.hint(strides[2]) % vector != 0
    shape_class = "unaligned" if unaligned else "transposed" if transposed else "rows"
    elements = target.hint(batch) * target.hint(tokens) * sum(widths)
    use = parameters_for(target.arch, shape_class, elements, widths, x.dtype.itemsize)
    outputs = []
    for count, dim, times in zip(heads, dims, repeats):
        order = (count * times, x.shape[1]) if head_major else (x.shape[1], count * times)
        shape = (x.shape[0], *order, dim)
        outputs.append(Output(shape, contiguous_strides(shape), x.dtype))
    launches = []
    for first in range(0, len(widths), MOST_WINDOWS):
        chosen = range(first, min(first + MOST_WINDOWS, len(widths)))
        args: dict[str, Any] = {
            "x_ptr": x, **_numbers(target, x, tokens, strides), "START": sum(widths[:first]),
            "HEAD_MAJOR": head_major, "ROWS": use["rows"], "LANES": use["lanes"], "VECTOR": vector,
            "TRANSPOSED": transposed, "PDL": target.arch.pdl,
        }  # fmt: skip
        for slot in range(MOST_WINDOWS):
            window = first + slot
            there = window in chosen
            args[f"out{slot}_ptr"] = outputs[window] if there else None
            args[f"HEADS{slot}"] = heads[window] if there else 0
            args[f"DIM{slot}"] = dims[window] if there else 1
            args[f"REPEATS{slot}"] = repeats[window] if there else 1
        tiles = sum(cdiv(widths[window], use["lanes"]) for window in chosen) * cdiv(tokens, use["rows"]) * batch
        launches.append(Launch(qkv_split_kernel, (tiles,), args, use["warps"]))
    return Program(tuple(launches), tuple(outputs))


# --- op --------------------------------------------------------------------------------------------------------------


def check_arguments(x: Tensor, heads: Sequence[int], dims: Sequence[int], repeats: Sequence[int]) -> None:
    """Check what the op is given, values aside.

    Raises:
        TypeError: x has the wrong dtype.
        ValueError: a shape or a number is wrong.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D], got shape {list(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    if not len(heads) == len(dims) == len(repeats):
        raise ValueError(
            f"heads, dims and repeats must have one entry per window, got {len(heads)}, {len(dims)} and {len(repeats)}"
        )
    if len(heads) < 2:
        raise ValueError(f"heads must be of two windows or more, got {list(heads)}: copy one with x.contiguous()")
    for name, values, least in (("heads", heads, 1), ("dims", dims, GRANULE), ("repeats", repeats, 1)):
        for value in values:
            if value < least or (least == GRANULE and value % GRANULE):
                wanted = f"positive multiples of {GRANULE}" if least == GRANULE else "positive"
                raise ValueError(f"{name} must be {wanted}, got {list(values)}")
    total, columns = sum(h * k for h, k in zip(heads, dims)), x.shape[2]
    # A symbolic number of columns is not compared: that would add a guard.
    if isinstance(columns, int) and total != columns:
        raise ValueError(f"heads * dims must sum to the {columns} columns of x, got {total}")


def _fake(
    x: Tensor, heads: Sequence[int], dims: Sequence[int], repeats: Sequence[int], head_major: bool
) -> list[Tensor]:
    check_arguments(x, heads, dims, repeats)
    batch, tokens = x.shape[:2]
    lanes = [h * r for h, r in zip(heads, repeats)]
    return [x.new_empty((batch, h, tokens, k) if head_major else (batch, tokens, h, k)) for h, k in zip(lanes, dims)]


def _cpu(
    x: Tensor, heads: Sequence[int], dims: Sequence[int], repeats: Sequence[int], head_major: bool
) -> list[Tensor]:
    check_arguments(x, heads, dims, repeats)
    return reference(x, heads, dims, repeats, head_major)


OP = define(
    "qkv_split",
    SCHEMA,
    reference=_cpu,
    fake=_fake,
    plan=plan,
    backward="qkv_split has no gradient: it is for inference. Call it under torch.no_grad(), or use torch.split and "
    "contiguous() where x requires one.",
)


@typed
def qkv_split(
    x: Tensor,
    heads: Sequence[int],
    dim: int | Sequence[int],
    *,
    repeats: Sequence[int] | None = None,
    head_first: bool = False,
) -> tuple[Tensor, ...]:
    """Copy queries, keys, values and the like out of the matrix that holds them side by side.

    Args:
        x: [B, T, D] or [T, D]; bfloat16, float16 or float32, any strides. Fast where neighbouring columns or
            neighbouring tokens are neighbours in memory.
        heads: heads of each window, in the order of the columns.
        dim: channels of a head, one number or one for each window; a multiple of 8.
        repeats: how often each head is repeated, one number for each window; 1 unless given.
        head_first: return [B, H, T, K] in place of [B, T, H, K].

    Returns:
        One contiguous tensor per window with x's dtype: [B, T, H * R, K], or [B, H * R, T, K] with `head_first`;
        without B where x has none.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what it must be.
        NotImplementedError: in a backward pass, which this op does not have.
    """
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [B, T, D] or [T, D], got shape {list(x.shape)}")
    dims = [dim] * len(heads) if isinstance(dim, int) else list(dim)
    times = [1] * len(heads) if repeats is None else list(repeats)
    batched = x if x.dim() == 3 else x.unsqueeze(0)
    outs = torch.ops.fusion_passes.qkv_split(batched, list(heads), dims, times, head_first)
    return tuple(outs if x.dim() == 3 else (out.squeeze(0) for out in outs))


# --- benchmark cases -------------------------------------------------------------------------------------------------


def plain(
    x: Tensor, heads: Sequence[int], dims: Sequence[int], repeats: Sequence[int], head_major: bool
) -> list[Tensor]:
    """A model's own spelling of the benchmarked cases: windows without repeats, tokens before heads."""
    windows = x.split([h * k for h, k in zip(heads, dims)], dim=-1)
    return [w.unflatten(-1, (h, k)).contiguous() for w, h, k in zip(windows, heads, dims)]


def cases() -> list[Any]:
    """The benchmarked shapes: Gated DeltaNet's 16, 16 and 32 heads of 128, whole and split over four GPUs.

    Bytes: x read once, the windows written once. "strided" is x as a convolution over time leaves it, [B, D, T].
    """
    from fusion_passes.benchmarking import Case

    shapes = [(16, t, False) for t in (8, 128, 2048, 16384, 65536)]
    shapes += [(16, t, True) for t in (128, 2048, 16381, 16384, 65536)]
    shapes += [(4, t, False) for t in (128, 2048, 16384, 65536)]
    shapes += [(4, t, True) for t in (128, 2045, 2048, 16384, 65536)]
    found = []
    for heads, tokens, strided in shapes:
        columns = 4 * heads * 128

        def make(device: torch.device, generator: torch.Generator, h: int = heads, t: int = tokens, d: int = columns,
                 across: bool = strided) -> tuple[Any, ...]:  # fmt: skip
            shape = (1, d, t) if across else (1, t, d)
            x = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            return (x.mT if across else x, [h, h, 2 * h], [128] * 3, [1] * 3, False)

        name = f"{heads}+{heads}+{2 * heads} heads x128 T={tokens} {'strided' if strided else 'contiguous'}"
        moved = 2 * 2 * columns * tokens
        found.append(Case(name, OP, make, bytes=moved, flops=0, reference=reference, plain=plain, bound=0.0,
                          peers={"sglang": _sglang}))  # fmt: skip
    return found


def _sglang() -> Any:
    """SGLang's kernel, which takes one batch and these layouts."""
    module = importlib.import_module("sglang.kernels.ops.attention.triton_gdn_fused_proj")
    return lambda x, heads, dims, *form: module.fused_qkv_split_gdn_prefill(x[0], *heads, *dims)
