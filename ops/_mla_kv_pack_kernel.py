"""Triton kernel of `mla_kv_pack`: K and V of all heads converted and put in place in one pass over memory.

A program takes ROWS heads of one token, with a two-dimensional grid, or ROWS consecutive (token, head) pairs of a
flat one. Columns are moved in tiles as wide as a power of two, so that any multiple of 8 is served by full vectors:
192 columns are 128 and 64. All loads of a program are issued before its first store. Row offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import begin


@triton.jit
def _load_columns(p_row, b_mask, WIDTH: tl.constexpr):
    """WIDTH columns from p_row [rows, 1] on: one tile for each power of two from 1024 down to 8, or a placeholder."""
    tiles = ()
    for i in tl.static_range(8):
        if (WIDTH >> (10 - i)) & 1:
            o_column = WIDTH // (2048 >> i) * (2048 >> i) + tl.arange(0, 1024 >> i)[None, :]
            tiles = tiles + (tl.load(p_row + o_column, mask=b_mask),)  # type: ignore[assignment]
        else:
            tiles = tiles + (0,)  # type: ignore[assignment]
    return tiles


@triton.jit
def _divided(b_value, b_scale):
    """b_value / b_scale as IEEE division rounds it, with one reciprocal for all elements (Markstein 1990).

    The quotient by reciprocal is corrected with its exact remainder. Scales whose reciprocal is not a normal number
    are divided by the long way; infinities, NaN and zeros (for their sign) keep the uncorrected quotient.
    """
    b_size = tl.abs(b_scale)
    if (b_size > 1e-37) & (b_size < 1e37):
        b_reciprocal = tl.div_rn(1.0, b_scale)
        b_near = b_value * b_reciprocal
        b_quotient = tl.fma(tl.fma(b_near, -b_scale, b_value), b_reciprocal, b_near)
        b_quotient = tl.where((b_quotient == b_quotient) & (b_near != 0.0), b_quotient, b_near)
    else:
        b_quotient = tl.div_rn(b_value, b_scale)
    return b_quotient


@triton.jit
def _take_steps(b_value, b_scale, STEPS: tl.constexpr, FACTOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The steps between load and cast, in float32; three bits of STEPS name each, see `_mla_kv_pack_steps`."""
    for i in tl.static_range(3):
        if ((STEPS >> (3 * i)) & 7) == 1:
            b_value = b_value * b_scale
        elif ((STEPS >> (3 * i)) & 7) == 2:
            b_value = _divided(b_value, b_scale)
        elif ((STEPS >> (3 * i)) & 7) == 3:
            b_value = b_value * tl.div_rn(1.0, b_scale)
        elif ((STEPS >> (3 * i)) & 7) == 4:
            b_value = b_value * FACTOR
        elif ((STEPS >> (3 * i)) & 7) == 5:
            b_value = tl.maximum(b_value, LOW, propagate_nan=tl.PropagateNan.ALL)
            b_value = tl.minimum(b_value, HIGH, propagate_nan=tl.PropagateNan.ALL)
    return b_value


@triton.jit
def _store_columns(
    p_row, b_mask, tiles, b_scale, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, FACTOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """What `_load_columns` read, after its steps, cast to the element type of p_row [ROWS, 1] and stored there."""
    for i in tl.static_range(8):
        if (WIDTH >> (10 - i)) & 1:
            o_column = WIDTH // (2048 >> i) * (2048 >> i) + tl.arange(0, 1024 >> i)[None, :]
            b_value = tiles[i]
            if STEPS != 0 or b_value.dtype != p_row.dtype.element_ty:
                b_value = _take_steps(b_value.to(tl.float32), b_scale, STEPS, FACTOR, LOW, HIGH)
            tl.store(p_row + o_column, b_value.to(p_row.dtype.element_ty), mask=b_mask)


@triton.jit
def _scale(scale_ptr):
    """The one element of a scale, or 1 where there is none."""
    b_scale = 1.0
    if scale_ptr is not None:
        b_scale = tl.load(scale_ptr).to(tl.float32)
    return b_scale


# Sizes that vary from call to call must not compile the kernel anew.
@triton.jit(do_not_specialize=["batch_tokens", "tokens"])
def mla_kv_pack_kernel(
    nope_ptr, pe_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_out_ptr, v_out_ptr,
    nope_offset, pe_offset, v_offset, batch_tokens, tokens,
    nope_stride_b, nope_stride_t, nope_stride_h, pe_stride_b, pe_stride_t, v_stride_b, v_stride_t, v_stride_h,
    NOPE_B: tl.constexpr, NOPE_T: tl.constexpr, NOPE_H: tl.constexpr, PE_B: tl.constexpr, PE_T: tl.constexpr,
    V_B: tl.constexpr, V_T: tl.constexpr, V_H: tl.constexpr,
    H: tl.constexpr, NOPE: tl.constexpr, PE: tl.constexpr, V: tl.constexpr,
    PE_FIRST: tl.constexpr, K_HEAD_MAJOR: tl.constexpr, V_HEAD_MAJOR: tl.constexpr,
    K_STEPS: tl.constexpr, K_FACTOR: tl.constexpr, K_LOW: tl.constexpr, K_HIGH: tl.constexpr,
    V_STEPS: tl.constexpr, V_FACTOR: tl.constexpr, V_LOW: tl.constexpr, V_HIGH: tl.constexpr,
    ROWS: tl.constexpr, FLAT: tl.constexpr, BATCHED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * tokens, blocks of ROWS heads), or with FLAT (blocks of ROWS pairs of token and head,).

    k_nope [B, T, H, NOPE], k_pe [B, T, PE] and v [B, T, H, V] by strides, the last of which is 1; a stride comes either
    compiled in (NOPE_T and so on) or, where that is -1, as a run-time argument. K [B, T, H, NOPE + PE] and V are
    contiguous, with HEAD_MAJOR as [B, H, T, .]. V = 0: there is no V. BATCHED: there may be more than one batch.
    """
    if FLAT:
        o_pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        o_bt = (o_pair // H).to(tl.int64)
        o_h = o_pair % H
        b_mask = o_bt < batch_tokens
    else:
        o_bt = tl.program_id(0).to(tl.int64)
        o_h = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        b_mask = o_h < H
    o_b = o_bt // tokens if BATCHED else o_bt * 0
    o_t = o_bt - o_b * tokens if BATCHED else o_bt
    o_h = o_h.to(tl.int64)

    p_nope = nope_ptr + nope_offset + o_t * (NOPE_T if NOPE_T >= 0 else nope_stride_t)
    p_nope += o_h * (NOPE_H if NOPE_H >= 0 else nope_stride_h)
    p_pe = pe_ptr + pe_offset + o_t * (PE_T if PE_T >= 0 else pe_stride_t)
    if BATCHED:
        p_nope += o_b * (NOPE_B if NOPE_B >= 0 else nope_stride_b)
        p_pe += o_b * (PE_B if PE_B >= 0 else pe_stride_b)
    # All heads of a token share its k_pe. Each row reads it again, from L1, which saves an exchange between threads.
    p_pe += tl.zeros([ROWS, 1], tl.int64)
    begin(PDL)
    nope = _load_columns(p_nope, b_mask, NOPE)
    pe = _load_columns(p_pe, b_mask, PE)
    if V > 0:
        p_v = v_ptr + v_offset + o_t * (V_T if V_T >= 0 else v_stride_t) + o_h * (V_H if V_H >= 0 else v_stride_h)
        if BATCHED:
            p_v += o_b * (V_B if V_B >= 0 else v_stride_b)
        v = _load_columns(p_v, b_mask, V)
    b_k_scale = _scale(k_scale_ptr)
    b_v_scale = _scale(v_scale_ptr)

    o_token_major = o_bt * H + o_h
    o_head_major = (o_b * H + o_h) * tokens + o_t
    p_k = k_out_ptr + (o_head_major if K_HEAD_MAJOR else o_token_major) * (NOPE + PE)
    _store_columns(p_k + (PE if PE_FIRST else 0), b_mask, nope, b_k_scale, NOPE, K_STEPS, K_FACTOR, K_LOW, K_HIGH)
    _store_columns(p_k + (0 if PE_FIRST else NOPE), b_mask, pe, b_k_scale, PE, K_STEPS, K_FACTOR, K_LOW, K_HIGH)
    if V > 0:
        p_v_out = v_out_ptr + (o_head_major if V_HEAD_MAJOR else o_token_major) * V
        _store_columns(p_v_out, b_mask, v, b_v_scale, V, V_STEPS, V_FACTOR, V_LOW, V_HIGH)
