"""Triton kernel of the serial half of `chunk_delta_rule`: the state's way through the chunks, and the output.

With the prologue's tiles and factors (see `_delta_rule_prologue`) one chunk is, for a state S [K, V] in float32
registers,

    v' = A (v - ka S)        o = qa S + Aq v'        S <- decay S + kd^T v'

where ka, qa and kd are the chunk's keys and queries with their decays, l2 norms and scale: rows, decayed by the
prologue (a decay per channel) or raw (a decay per head), with one factor each. Neither v' nor a state leaves the chip.

Where heads and batch are too few to fill the GPU the chunks are cut into segments. A first launch (SUMMARY) finds the
affine map of each segment, S -> M S + N: N by starting from zero, M column by column by starting from the identity with
v = 0. The programs of the second one apply the maps of the segments before their own and go on from there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import begin
from fusion_passes.ops._delta_rule_prologue import CHUNK


@triton.jit
def _chunk_range(batch, segment, cu_seqlens_ptr, tokens, VARLEN: tl.constexpr, SEGMENTS: tl.constexpr):
    """(batch row, first token, tokens, first slot, first chunk, last chunk + 1) of a segment of a row or sequence."""
    if VARLEN:
        row = batch * 0
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch).to(tl.int64), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch + 1).to(tl.int64), start), tokens)
        slot = start // CHUNK + batch
        length = (end - start).to(tl.int32)
    else:
        row = batch
        start = tl.full([], 0, tl.int64)
        slot = batch * tl.cdiv(tokens, CHUNK).to(tl.int64)
        length = tokens
    chunks = tl.cdiv(length, CHUNK)
    per_segment = tl.cdiv(chunks, SEGMENTS)
    low = tl.minimum(segment * per_segment, chunks)
    return row, start, length, slot, low, tl.minimum(low + per_segment, chunks)


@triton.jit
def _load(p_x, b_mask, MASKED: tl.constexpr):
    if MASKED:
        b_x = tl.load(p_x, mask=b_mask, other=0.0)
    else:
        b_x = tl.load(p_x)
    return b_x


@triton.jit
def _store(p_x, b_x, b_mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(p_x, b_x, mask=b_mask)
    else:
        tl.store(p_x, b_x)


@triton.jit
def _carry_in(
    b_state, p_map, p_add, segment, o_k, o_v, BK: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The state at the start of a segment: the maps of all segments before it, one after the other."""
    for _ in range(segment):
        b_map = tl.load(p_map + o_k[:, None] * BK + o_k[None, :])
        b_add = tl.load(p_add + o_k[:, None] * V + o_v[None, :])
        b_state = tl.dot(b_map, b_state, b_add, input_precision=PRECISION)
        p_map += BK * BK
        p_add += BK * V
    return b_state


@triton.jit
def _first_state(
    state_ptr, maps_ptr, adds_ptr, sequence_head, segment, is_map, o_k, o_v, b_inside,
    SUMMARY: tl.constexpr, SEGMENTS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state [BK, BV] that a program starts from."""
    b_state = tl.zeros([BK, BV], tl.float32)
    if SUMMARY:
        if is_map:
            b_state = tl.where(o_k[:, None] == o_v[None, :], 1.0, 0.0)
    else:
        if state_ptr is not None:
            p_state = state_ptr + sequence_head * (K * V) + o_k[:, None] * V + o_v[None, :]
            b_state += tl.load(p_state, mask=b_inside, other=0.0).to(tl.float32)
        if SEGMENTS > 1:
            p_map = maps_ptr + sequence_head * SEGMENTS * (BK * BK)
            p_add = adds_ptr + sequence_head * SEGMENTS * (BK * V)
            b_state = _carry_in(b_state, p_map, p_add, segment, o_k, o_v, BK, V, PRECISION)
    return b_state


@triton.jit
def _store_state(
    b_state, final_ptr, maps_ptr, adds_ptr, sequence_head, segment, is_map, o_k, o_v, b_inside,
    SUMMARY: tl.constexpr, SEGMENTS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Where the state of a program goes: the maps of its segment, or the final state of its sequence."""
    place = sequence_head * SEGMENTS + segment
    if SUMMARY:
        if is_map:
            tl.store(maps_ptr + place * (BK * BK) + o_k[:, None] * BK + o_v[None, :], b_state)
        else:
            tl.store(adds_ptr + place * (BK * V) + o_k[:, None] * V + o_v[None, :], b_state)
    elif final_ptr is not None:
        if segment == SEGMENTS - 1:
            p_final = final_ptr + sequence_head * (K * V) + o_k[:, None] * V + o_v[None, :]
            tl.store(p_final, b_state, mask=b_inside)


@triton.jit
def _read(b_x, b_state, p_factors, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr):
    """x S, times the factors of the rows, which those of a decay per channel have in them."""
    b_read = tl.dot(b_x, b_state.to(b_x.dtype), input_precision=PRECISION)
    if not PER_CHANNEL:
        b_read *= tl.load(p_factors)[:, None]
    return b_read


@triton.jit
def _rows(x_ptr, x_offset, row, stride_b, head, stride_h, o_row, stride_t):
    """Pointers [64] to the first element of a head's rows."""
    return x_ptr + x_offset + row * stride_b + head * stride_h + o_row * stride_t


@triton.jit(do_not_specialize=["tokens", "sequences"])
def delta_rule_scan_kernel(
    q_ptr, k_ptr, v_ptr, tiles_ptr, factors_ptr, rows_ptr, decay_ptr, state_ptr, cu_seqlens_ptr,
    o_ptr, final_ptr, maps_ptr, adds_ptr,
    q_offset, k_offset, v_offset, tokens, sequences,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    PER_CHANNEL: tl.constexpr, VARLEN: tl.constexpr, SUMMARY: tl.constexpr, SEGMENTS: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (column blocks * HV * SEGMENTS * sequences,), column blocks innermost.

    v [B, T, HV, V], o [B, T, HV, V] contiguous, state and final [sequences, HV, K, V] float32. With SUMMARY the columns
    are those of v and then BK of the identity, and the results adds [sequences, HV, SEGMENTS, BK, V] and
    maps [sequences, HV, SEGMENTS, BK, BK], float32.
    """
    begin(PDL)
    tl.static_assert(V % BV == 0, "BV must divide V")
    tl.static_assert(not SUMMARY or BK % BV == 0, "BV must divide BK")
    operand: tl.constexpr = tiles_ptr.dtype.element_ty
    v_blocks: tl.constexpr = V // BV
    blocks: tl.constexpr = v_blocks + (BK // BV if SUMMARY else 0)
    pid = tl.program_id(0)
    block = pid % blocks
    head = pid // blocks % HV
    segment = pid // (blocks * HV) % SEGMENTS
    batch = (pid // (blocks * HV * SEGMENTS)).to(tl.int64)
    is_map = block >= v_blocks
    row, start, length, slot, low, high = _chunk_range(batch, segment, cu_seqlens_ptr, tokens, VARLEN, SEGMENTS)
    o_t = tl.arange(0, CHUNK)
    o_k = tl.arange(0, BK)
    o_v = (block - v_blocks if is_map else block) * BV + tl.arange(0, BV)
    b_value = (block * BV + tl.arange(0, BV) < V)[None, :]
    b_inside = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_state = _first_state(
        state_ptr, maps_ptr, adds_ptr, batch * HV + head, segment, is_map, o_k, o_v, b_inside,
        SUMMARY, SEGMENTS, K, BK, V, BV, PRECISION,
    )  # fmt: skip
    o_row = start + low.to(tl.int64) * CHUNK + o_t
    tile = (slot + low) * HV + head
    p_v = _rows(v_ptr, v_offset, row, v_stride_b, head, v_stride_h, o_row, v_stride_t)[:, None] + o_v[None, :]
    p_o = o_ptr if SUMMARY else o_ptr + ((row * tokens + o_row) * HV + head)[:, None] * V + o_v[None, :]
    p_a = tiles_ptr + tile * (2 * CHUNK * CHUNK) + o_t[:, None] * CHUNK + o_t[None, :]
    if PER_CHANNEL:
        p_rows = rows_ptr + tile * (3 * CHUNK * BK) + o_t[:, None] * BK + o_k[None, :]
        p_decay = decay_ptr + tile * BK + o_k
        p_factors = p_decay
    else:
        key_head = head // (HV // HK)
        p_k = _rows(k_ptr, k_offset, row, k_stride_b, key_head, k_stride_h, o_row, k_stride_t)[:, None] + o_k[None, :]
        p_q = _rows(q_ptr, q_offset, row, q_stride_b, key_head, q_stride_h, o_row, q_stride_t)[:, None] + o_k[None, :]
        p_factors = factors_ptr + tile * (4 * CHUNK) + o_t
        p_total = factors_ptr + tile * (4 * CHUNK) + 3 * CHUNK
    for chunk in tl.range(low, high, num_stages=STAGES):
        b_token = (o_t + chunk * CHUNK < length)[:, None]
        b_v = _load(p_v, b_token & b_value, not EVEN or SUMMARY).to(tl.float32)
        if PER_CHANNEL:
            b_k = tl.load(p_rows)
            b_into = tl.load(p_rows + 2 * CHUNK * BK)
            b_decay = tl.load(p_decay, mask=o_k * 0 + chunk < high, other=0.0)[:, None]
        else:
            b_wide = b_token & (o_k < K)[None, :]
            b_k = _load(p_k, b_wide, not EVEN or K != BK).to(operand)
            b_into = b_k
            b_decay = tl.load(p_total, mask=chunk < high, other=0.0)
        b_read = _read(b_k, b_state, p_factors, PER_CHANNEL, PRECISION)
        b_new = tl.dot(tl.load(p_a), (b_v - b_read).to(operand), input_precision=PRECISION)
        if not SUMMARY:
            b_q = tl.load(p_rows + CHUNK * BK) if PER_CHANNEL else _load(p_q, b_wide, not EVEN or K != BK).to(operand)
            b_o = _read(b_q, b_state, p_factors + CHUNK, PER_CHANNEL, PRECISION)
            b_o = tl.dot(tl.load(p_a + CHUNK * CHUNK), b_new.to(operand), b_o, input_precision=PRECISION)
            _store(p_o, b_o.to(o_ptr.dtype.element_ty), b_token, not EVEN)
            p_o += CHUNK * HV * V
        if not PER_CHANNEL:
            b_new *= tl.load(p_factors + 2 * CHUNK)[:, None]
        b_state = tl.dot(tl.trans(b_into), b_new.to(operand), b_state * b_decay, input_precision=PRECISION)
        p_v += CHUNK * v_stride_t
        p_a += HV * (2 * CHUNK * CHUNK)
        if PER_CHANNEL:
            p_rows += HV * (3 * CHUNK * BK)
            p_decay += HV * BK
        else:
            p_k += CHUNK * k_stride_t
            p_q += CHUNK * q_stride_t
            p_factors += HV * (4 * CHUNK)
            p_total += HV * (4 * CHUNK)

    _store_state(
        b_state, final_ptr, maps_ptr, adds_ptr, batch * HV + head, segment, is_map, o_k, o_v, b_inside,
        SUMMARY, SEGMENTS, K, BK, V,
    )  # fmt: skip
