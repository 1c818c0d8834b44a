"""Keys and values of multi-head latent attention, put together and cast in one pass.

    K[b, t, h] = cast(steps_k([k_nope[b, t, h] | k_pe[b, t]]))       the rotary part is shared by all heads
    V[b, t, h] = cast(steps_v(v[b, t, h]))

as in DeepSeek-V2 (arXiv:2405.04434, section 2.1), where k_nope and v are windows of one projection's output. The
steps are a scale, a number and a clamp, see `_mla_kv_pack_steps`; the cast goes to float8 (e4m3fn or e5m2), or to the
dtype of k_nope for the key alone. k_pe may also come first.

Numerics. Values are widened to float32, take their steps there, and are rounded once, to nearest even. That is what
torch.compile makes of `(k * scale).to(torch.float8_e4m3fn)` in bfloat16; eager PyTorch rounds the product to bfloat16
first. A quotient is the IEEE one, as in eager PyTorch; Inductor's own is off by up to two units in the last place of
float32, and `x / s` is not `x * (1 / s)`: the step says which of the two. Casts to float8 saturate on every version of
PyTorch: 1e6 and infinity become 448 (e4m3fn) or 57344 (e5m2), NaN stays NaN. Eager PyTorch up to 2.11 gives NaN
(e4m3fn) or infinity (e5m2) there instead.

One pass over memory: 832 bytes per token and head of 128 + 64 and 128 columns of bfloat16, and k_pe once per token.

Dims: B batch, T tokens, H heads, N, R, V columns of k_nope, k_pe and v.

Launch parameters:
    rows: heads of one token, or with `flat` pairs of token and head, of a program.
    warps: warps of a program.
    flat: 1 for programs that take pairs of token and head in order, 0 for programs that take heads of one token.
    pdl: 1 for programmatic dependent launch, on GPUs that have it.

Shape classes, by tokens times heads:
    pack: all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fusion_passes.arch import Architecture
from fusion_passes.lowering import (
    Launch,
    NotInlinable,
    Operand,
    Output,
    Size,
    Target,
    cdiv,
    constant_or_argument,
    contiguous_strides,
    define,
    static,
)
from fusion_passes.ops import _mla_kv_pack_steps as steps_of
from fusion_passes.ops._checks import typed
from fusion_passes.ops._mla_kv_pack_checks import FLOAT8, LARGEST_WIDTH, check_arguments
from fusion_passes.tuning import Complaint, Parameters, TunedTable

Tensor = torch.Tensor

_KEY = "Tensor k_nope, Tensor k_pe"
_KEY_FORM = "str k_steps, ScalarType k_dtype, str k_layout, bool pe_first"
_VALUE_FORM = "str v_steps, ScalarType v_dtype, str v_layout"
SCHEMA = f"({_KEY}, Tensor v, Tensor? k_scale, Tensor? v_scale, {_KEY_FORM}, {_VALUE_FORM}) -> (Tensor, Tensor)"
KEY_SCHEMA = f"({_KEY}, Tensor? k_scale, {_KEY_FORM}) -> Tensor"

TABLE = TunedTable(
    "mla_kv_pack",
    Path(__file__).parent / "tuned" / "mla_kv_pack.json",
    ("rows", "warps", "flat", "pdl"),
    ("flat", "pdl"),
)


# --- reference -------------------------------------------------------------------------------------------------------


def key_reference(
    k_nope: Tensor, k_pe: Tensor, k_scale: Tensor | None, k_steps: str, k_dtype: torch.dtype, k_layout: str,
    pe_first: bool,
) -> Tensor:  # fmt: skip
    """K in plain PyTorch; arguments as in `KEY_SCHEMA`. On float64 tensors the uncast values in float64."""
    shared = k_pe[:, :, None].expand(*k_nope.shape[:3], -1)
    wide = torch.cat([shared, k_nope] if pe_first else [k_nope, shared], dim=-1)
    return _finished(wide, k_scale, k_steps, k_dtype, k_layout)


def reference(
    k_nope: Tensor, k_pe: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, k_steps: str,
    k_dtype: torch.dtype, k_layout: str, pe_first: bool, v_steps: str, v_dtype: torch.dtype, v_layout: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """K and V in plain PyTorch; arguments as in `SCHEMA`. On float64 tensors the uncast values in float64."""
    key = key_reference(k_nope, k_pe, k_scale, k_steps, k_dtype, k_layout, pe_first)
    return key, _finished(v, v_scale, v_steps, v_dtype, v_layout)


def _finished(wide: Tensor, scale: Tensor | None, steps: str, dtype: torch.dtype, layout: str) -> Tensor:
    value = steps_of.apply(wide, scale, steps_of.parse(steps))
    value = value if wide.dtype == torch.float64 else steps_of.saturating_cast(value, dtype)
    return (value.transpose(1, 2) if layout == "bhtd" else value).contiguous()


# --- launch ----------------------------------------------------------------------------------------------------------


def float8_reason(arch: Architecture) -> str | None:
    """Why a GPU cannot cast to float8 as the op does, or None."""
    if arch.name.startswith("sm_") and int(arch.name[3:]) >= 89:
        return None
    return f"{arch.gpu} ({arch.name}) has no saturating conversion to e4m3fn and e5m2; NVIDIA GPUs do from sm_89 on"


def _complaint(parameters: Parameters, arch: Architecture, columns: int) -> Complaint:
    rows, warps = parameters["rows"], parameters["warps"]
    if warps * arch.warp_size > arch.max_threads:
        return f"{warps} warps are {warps * arch.warp_size} threads, and a block of {arch.name} has {arch.max_threads}"
    held = rows * columns // (warps * arch.warp_size)
    if held > 128:
        return f"a thread would hold {held} values (rows * columns / threads), and 128 fit in its registers"
    return None


def _fit(parameters: Parameters, heads: int, columns: int, arch: Architecture) -> Parameters:
    """A table entry for this shape: no more rows than heads of a token, and no more than registers can hold."""
    rows, warps = parameters["rows"], parameters["warps"]
    if not parameters["flat"]:
        rows = min(rows, 1 << (heads - 1).bit_length())
    while rows > 1 and rows * columns // (warps * arch.warp_size) > 96:
        rows //= 2
    while rows * columns // (warps * arch.warp_size) > 128:
        warps *= 2
    return {**parameters, "rows": rows, "warps": warps}


def parameters_for(arch: Architecture, pairs: int, heads: int, columns: int) -> Parameters:
    """The launch parameters (see the kernel) for a number of (token, head) pairs with `columns` read for each.

    Raises:
        ValueError: parameters that the user forces cannot run; the message says why.
    """
    return TABLE.choose(
        arch, "pack", pairs,
        fit=lambda p: _fit(p, heads, columns, arch),
        complaint=lambda p: _complaint(p, arch, columns),
    )  # fmt: skip


def _strides(target: Target, tensor: str, operand: Operand | None, axes: str) -> dict[str, Any]:
    """The strides of the leading axes; an eager kernel takes all but zeros at run time."""
    found: dict[str, Any] = {}
    for axis, stride in zip(axes, operand.used_strides if operand is not None else (0,) * len(axes)):
        names = f"{tensor.upper()}_{axis.upper()}", f"{tensor}_stride_{axis}"
        found |= constant_or_argument(target, *names, stride, always=static(stride) == 0)
    return found


def _forms(steps: str, name: str) -> dict[str, Any]:
    form = steps_of.parse(steps)
    return {
        f"{name}_STEPS": form.code,
        f"{name}_FACTOR": form.factor,
        f"{name}_LOW": form.low,
        f"{name}_HIGH": form.high,
    }


def _output(shape: tuple[Size, ...], width: int, dtype: torch.dtype, layout: str) -> Output:
    batch, tokens, heads = shape
    extents = (batch, heads, tokens, width) if layout == "bhtd" else (batch, tokens, heads, width)
    return Output(extents, contiguous_strides(extents), dtype)


def plan(
    target: Target, k_nope: Operand, k_pe: Operand, v: Operand | None, k_scale: Operand | None,
    v_scale: Operand | None, k_steps: str, k_dtype: torch.dtype, k_layout: str, pe_first: bool,
    v_steps: str, v_dtype: torch.dtype, v_layout: str,
) -> Launch:  # fmt: skip
    """The one launch of `mla_kv_pack_kernel` that computes the op; without `v` K alone."""
    from fusion_passes.ops._mla_kv_pack_kernel import mla_kv_pack_kernel

    reason = float8_reason(target.arch) if FLOAT8.intersection((k_dtype, v_dtype)) else None
    if reason is not None:
        raise NotImplementedError(f"mla_kv_pack: {reason}")
    batch, tokens = k_nope.shape[:2]
    heads, nope, pe, width = (static(n) for n in (*k_nope.shape[2:], k_pe.shape[2], v.shape[3] if v is not None else 0))
    if heads is None or nope is None or pe is None or width is None:
        raise NotInlinable(f"heads and columns must be known at compile time, k_nope is {k_nope.shape}")
    if max(nope, pe, width) > LARGEST_WIDTH:
        raise NotInlinable(f"the kernel moves up to {LARGEST_WIDTH} columns, got {nope}, {pe} and {width}")
    pairs = target.hint(batch) * target.hint(tokens) * heads
    use = parameters_for(target.arch, pairs, heads, nope + pe + width)
    flat = bool(use["flat"])
    rows = batch * tokens
    grid = (cdiv(rows * heads, use["rows"]),) if flat else (rows, cdiv(heads, use["rows"]))
    args: dict[str, Any] = {
        "nope_ptr": k_nope, "pe_ptr": k_pe, "v_ptr": v,
        "k_scale_ptr": k_scale and k_scale.whole(), "v_scale_ptr": v_scale and v_scale.whole(),
        "k_out_ptr": _output((batch, tokens, heads), nope + pe, k_dtype, k_layout),
        "v_out_ptr": _output((batch, tokens, heads), width, v_dtype, v_layout) if v is not None else None,
        "nope_offset": k_nope.offset, "pe_offset": k_pe.offset, "v_offset": v.offset if v is not None else 0,
        "batch_tokens": rows, "tokens": tokens,
        **_strides(target, "nope", k_nope, "bth"), **_strides(target, "pe", k_pe, "bt"),
        **_strides(target, "v", v, "bth"),
        "H": heads, "NOPE": nope, "PE": pe, "V": width,
        "PE_FIRST": pe_first, "K_HEAD_MAJOR": k_layout == "bhtd", "V_HEAD_MAJOR": v_layout == "bhtd",
        **_forms(k_steps, "K"), **_forms(v_steps, "V"),
        "ROWS": use["rows"], "FLAT": flat, "BATCHED": static(batch) != 1, "PDL": bool(use["pdl"]) and target.arch.pdl,
    }  # fmt: skip
    return Launch(mla_kv_pack_kernel, grid, args, use["warps"])


def key_plan(
    target: Target, k_nope: Operand, k_pe: Operand, k_scale: Operand | None, k_steps: str, k_dtype: torch.dtype,
    k_layout: str, pe_first: bool,
) -> Launch:  # fmt: skip
    """`plan` for K alone."""
    return plan(target, k_nope, k_pe, None, k_scale, None, k_steps, k_dtype, k_layout, pe_first, "", k_dtype, k_layout)


# --- op --------------------------------------------------------------------------------------------------------------


def _empty(like: Tensor, width: Any, dtype: torch.dtype, layout: str) -> Tensor:
    batch, tokens, heads = like.shape[:3]
    shape = (batch, heads, tokens, width) if layout == "bhtd" else (batch, tokens, heads, width)
    return like.new_empty(shape, dtype=dtype)


def _key_fake(
    k_nope: Tensor, k_pe: Tensor, k_scale: Tensor | None, k_steps: str, k_dtype: torch.dtype, k_layout: str,
    pe_first: bool,
) -> Tensor:  # fmt: skip
    check_arguments(k_nope, k_pe, None, {"k": (k_scale, k_steps, k_dtype, k_layout)})
    return _empty(k_nope, k_nope.shape[3] + k_pe.shape[2], k_dtype, k_layout)


def _fake(
    k_nope: Tensor, k_pe: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, k_steps: str,
    k_dtype: torch.dtype, k_layout: str, pe_first: bool, v_steps: str, v_dtype: torch.dtype, v_layout: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    forms = {"k": (k_scale, k_steps, k_dtype, k_layout), "v": (v_scale, v_steps, v_dtype, v_layout)}
    check_arguments(k_nope, k_pe, v, forms)
    key = _empty(k_nope, k_nope.shape[3] + k_pe.shape[2], k_dtype, k_layout)
    return key, _empty(v, v.shape[3], v_dtype, v_layout)


def _key_cpu(*args: Any) -> Tensor:
    _key_fake(*args)
    return key_reference(*args)


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    _fake(*args)
    return reference(*args)


_NO_GRADIENT = (
    "{} has no gradient: it is for inference. Call it under torch.no_grad(), or build the key with torch.cat where one "
    "of its parts requires a gradient."
)

OP = define("mla_kv_pack", SCHEMA, reference=_cpu, fake=_fake, plan=plan, backward=_NO_GRADIENT.format("mla_kv_pack"))
KEY_OP = define(
    "mla_k_pack", KEY_SCHEMA, reference=_key_cpu, fake=_key_fake, plan=key_plan,
    backward=_NO_GRADIENT.format("mla_k_pack"),
)  # fmt: skip


@typed
def mla_kv_pack(
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor | None = None,
    *,
    k_steps: str = "",
    v_steps: str = "",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    pe_first: bool = False,
    head_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """K and V of the formula at the top of this module.

    Args:
        k_nope: [T, H, N] or [B, T, H, N]; bfloat16, float16 or float32; any strides whose last is 1.
        k_pe: [T, R], [T, 1, R], or with a leading B: the part of the key that all heads share.
        v: [T, H, V] or [B, T, H, V], or None for the key alone. N, R and V are multiples of 8 up to 1024.
        k_steps, v_steps: what happens before the cast, such as "*s" (times the scale), "/s", "*0.5" or
            "*s clamp(-240.0,240.0)"; see `fusion_passes.ops._mla_kv_pack_steps`.
        k_scale, v_scale: the scales that the steps name, tensors of one element.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2; or the dtype of the inputs for an uncast key.
        pe_first: put k_pe before k_nope.
        head_first: return [H, T, .] or [B, H, T, .].

    Returns:
        K [.., T, H, N + R] and V [.., T, H, V] (None without v), contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message says what it is
            and what it must be.
        NotImplementedError: the GPU has no saturating conversion to float8, or a backward pass reaches the op.
    """
    if k_nope.dim() not in (3, 4):
        raise ValueError(f"k_nope must be [T, H, N] or [B, T, H, N], got shape {list(k_nope.shape)}")
    single = k_nope.dim() == 3
    nope, value = (t if t is None or not single else t.unsqueeze(0) for t in (k_nope, v))
    assert nope is not None
    pe = k_pe.unsqueeze(0) if single else k_pe
    pe = pe.squeeze(2) if pe.dim() == 4 and pe.shape[2] == 1 else pe
    layout = "bhtd" if head_first else "bthd"
    if value is None:
        key, packed = KEY_OP(nope, pe, k_scale, k_steps, dtype, layout, pe_first), None
    else:
        key, packed = OP(nope, pe, value, k_scale, v_scale, k_steps, dtype, layout, pe_first, v_steps, dtype, layout)
    return (key.squeeze(0), packed if packed is None else packed.squeeze(0)) if single else (key, packed)


# --- benchmark cases -------------------------------------------------------------------------------------------------


def cases() -> list[Any]:
    """What the op is benchmarked on, a list of `fusion_passes.benchmarking.Case`."""
    from fusion_passes.ops import _mla_kv_pack_cases

    return _mla_kv_pack_cases.cases()
