"""Triton kernel of `gate_cumsum`: gate and chunk-local cumulative sum in one pass over memory.

A program takes one chunk of one sequence and LANES neighbouring lanes: channels of one head, or heads where the
gate is one number per head (K = 1). It sums the CHUNK rows of the chunk in one of two ways:

* SERIAL: CHUNK / ROWS segments side by side. A thread adds the ROWS rows of a segment one after the other in
  registers; a scan over the segments, of one row each, gives what came before. All loads of a chunk are in flight
  before the first value is used, a_log and bias among them.
* otherwise in steps of ROWS x LANES tiles, each summed along its rows by a parallel scan, with the sum so far carried.

Arithmetic is float32. Row offsets are 64-bit. Token strides that are known when the kernel is compiled are
constants, which puts row addresses into the instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import begin, log2_1p_exp2, sigmoid_exp2


@triton.jit
def _gate_factors(
    b_a, b_bias, SCALE: tl.constexpr, LOWER_BOUND: tl.constexpr, BETA: tl.constexpr, BOUNDED: tl.constexpr
):
    """Bias, slope and rate as `_gate` takes them: all that does not depend on the token, in units of log2."""
    b_exp_a = tl.exp(b_a)
    if BOUNDED:
        b_slope = b_exp_a * -1.4426950408889634
        b_rate = tl.zeros_like(b_a) + LOWER_BOUND * SCALE
    else:
        b_slope = b_exp_a
        b_rate = b_exp_a * (-SCALE / BETA * 0.6931471805599453)
        b_bias = b_bias * (BETA * 1.4426950408889634)
    return b_bias, b_slope, b_rate


@triton.jit
def _gate(b_raw, b_bias, b_slope, b_rate, BETA: tl.constexpr, THRESHOLD: tl.constexpr, BOUNDED: tl.constexpr):
    """The scaled log decay of raw gate values; b_bias carries BETA and log2(e), b_rate all behind the nonlinearity."""
    if BOUNDED:
        b_gate = b_rate * sigmoid_exp2((b_raw + b_bias) * b_slope)
    else:
        b_z = tl.fma(b_raw, BETA * 1.4426950408889634, b_bias)
        b_softplus = log2_1p_exp2(b_z)
        # From 18 on both sides of the threshold round to z in float32.
        if THRESHOLD < 18.0:
            b_softplus = tl.where(b_z > THRESHOLD * 1.4426950408889634, b_z, b_softplus)
        # Without a threshold exp overflows in float32, and so does what the reference computes.
        if THRESHOLD > 88.0:
            b_overflow = (b_z > 128.0) & (b_z <= THRESHOLD * 1.4426950408889634)
            b_softplus = tl.where(b_overflow, float("inf"), b_softplus)
        b_gate = b_rate * b_softplus
    return b_gate


@triton.jit
def _then(b_before, b_sum, b_before_next, b_sum_next):
    """Joins (sum before the last element, sum) of two neighbouring ranges; scanned, it gives sums without own element.

    Subtracting the own element from an inclusive sum instead would turn -inf into NaN.
    """
    return b_sum + b_before_next, b_sum + b_sum_next


@triton.jit
def _load_rows(p_raw, raw_row, o_first, valid, b_lanes, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Row i of every segment, for each i, as a tuple: every load is in flight before the first value is used."""
    rows = ()
    for i in tl.static_range(ROWS):
        b_mask = b_lanes
        if MASKED:
            b_mask = b_lanes & (o_first + i < valid)[:, None]
        b_row = tl.load(p_raw + i * raw_row, mask=b_mask, other=0.0, eviction_policy="evict_first")
        rows = rows + (b_row,)  # type: ignore[assignment]
    return rows


@triton.jit
def _segment_scan(
    p_raw, p_out, raw_row, out_row, valid, b_lane, b_a, b_bias,
    SCALE: tl.constexpr, LOWER_BOUND: tl.constexpr, BETA: tl.constexpr, THRESHOLD: tl.constexpr, BOUNDED: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    MASKED: tl.constexpr, PAD_GATE: tl.constexpr, STORE_TAIL: tl.constexpr,
):  # fmt: skip
    """Segment s holds rows s * ROWS to (s + 1) * ROWS; p_raw and p_out are LANES pointers to the chunk's first row."""
    SEGMENTS: tl.constexpr = CHUNK // ROWS
    o_first = tl.arange(0, SEGMENTS) * ROWS
    b_lanes = tl.broadcast_to(b_lane[None, :], [SEGMENTS, LANES])
    p_raw = p_raw[None, :] + (o_first.to(tl.int64) * raw_row)[:, None]
    p_out = p_out[None, :] + (o_first.to(tl.int64) * out_row)[:, None]
    rows = _load_rows(p_raw, raw_row, o_first, valid, b_lanes, ROWS, MASKED)
    b_bias, b_slope, b_rate = _gate_factors(b_a, b_bias, SCALE, LOWER_BOUND, BETA, BOUNDED)
    b_sum = tl.zeros([SEGMENTS, LANES], dtype=tl.float32)
    sums = ()
    for i in tl.static_range(ROWS):
        b_raw = rows[i].to(tl.float32)
        b_gate = _gate(b_raw, b_bias[None, :], b_slope[None, :], b_rate[None, :], BETA, THRESHOLD, BOUNDED)
        if MASKED and not PAD_GATE:
            b_gate = tl.where((o_first + i < valid)[:, None], b_gate, 0.0)
        b_sum += b_gate
        sums = sums + (b_sum,)  # type: ignore[assignment]
    if SEGMENTS > 1:
        b_before, b_sum = tl.associative_scan((tl.zeros_like(b_sum), b_sum), 0, _then)
    else:
        b_before = tl.zeros_like(b_sum)
    for i in tl.static_range(ROWS):
        b_mask = b_lanes
        if MASKED and not STORE_TAIL:
            b_mask = b_lanes & (o_first + i < valid)[:, None]
        tl.store(p_out + i * out_row, sums[i] + b_before, mask=b_mask, eviction_policy="evict_first")


@triton.jit
def _tile_scan(
    p_raw, p_out, raw_row, out_row, valid, b_lane, b_a, b_bias,
    SCALE: tl.constexpr, LOWER_BOUND: tl.constexpr, BETA: tl.constexpr, THRESHOLD: tl.constexpr, BOUNDED: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    MASKED: tl.constexpr, PAD_GATE: tl.constexpr, STORE_TAIL: tl.constexpr,
):  # fmt: skip
    """Tile by tile: ROWS rows are summed in parallel, and the sum so far is carried to the next tile."""
    b_bias, b_slope, b_rate = _gate_factors(b_a, b_bias, SCALE, LOWER_BOUND, BETA, BOUNDED)
    b_carry = tl.zeros([LANES], dtype=tl.float32)
    o_row = tl.arange(0, ROWS).to(tl.int64)
    for first in tl.range(0, CHUNK, ROWS, loop_unroll_factor=1):
        b_row = (first + o_row < valid)[:, None]
        b_mask = b_lane[None, :] & b_row if MASKED else tl.broadcast_to(b_lane[None, :], [ROWS, LANES])
        b_raw = tl.load(p_raw[None, :] + o_row[:, None] * raw_row, mask=b_mask, other=0.0).to(tl.float32)
        b_gate = _gate(b_raw, b_bias[None, :], b_slope[None, :], b_rate[None, :], BETA, THRESHOLD, BOUNDED)
        if MASKED and not PAD_GATE:
            b_gate = tl.where(b_row, b_gate, 0.0)
        b_sum = tl.cumsum(b_gate, axis=0) + b_carry[None, :]
        if STORE_TAIL:
            b_mask = tl.broadcast_to(b_lane[None, :], [ROWS, LANES])
        tl.store(p_out[None, :] + o_row[:, None] * out_row, b_sum, mask=b_mask)
        if ROWS < CHUNK:
            b_carry += tl.sum(b_gate, axis=0)
            p_raw += ROWS * raw_row
            p_out += ROWS * out_row


@triton.jit
def _scan(
    p_raw, p_out, raw_row, out_row, valid, b_lane, b_a, b_bias,
    SCALE: tl.constexpr, LOWER_BOUND: tl.constexpr, BETA: tl.constexpr, THRESHOLD: tl.constexpr, BOUNDED: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    MASKED: tl.constexpr, PAD_GATE: tl.constexpr, STORE_TAIL: tl.constexpr, SERIAL: tl.constexpr,
):  # fmt: skip
    if SERIAL:
        _segment_scan(
            p_raw, p_out, raw_row, out_row, valid, b_lane, b_a, b_bias, SCALE, LOWER_BOUND, BETA, THRESHOLD, BOUNDED,
            CHUNK, ROWS, LANES, MASKED, PAD_GATE, STORE_TAIL,
        )  # fmt: skip
    else:
        _tile_scan(
            p_raw, p_out, raw_row, out_row, valid, b_lane, b_a, b_bias, SCALE, LOWER_BOUND, BETA, THRESHOLD, BOUNDED,
            CHUNK, ROWS, LANES, MASKED, PAD_GATE, STORE_TAIL,
        )  # fmt: skip


@triton.jit
def _lane_offsets(o_h, o_k, stride_g, stride_r, stride_k, G: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr):
    """Element offsets of the lanes in a tensor whose head axis is split into groups."""
    one = tl.full([], 1, tl.int64)
    if G == 1:
        o_head = o_h * (one * stride_r)
    elif R == 1:
        o_head = o_h * (one * stride_g)
    else:
        o_head = (o_h // R) * (one * stride_g) + (o_h % R) * (one * stride_r)
    return tl.zeros([LANES], tl.int64) + o_head + o_k * (one * stride_k)


@triton.jit
def _locate_chunk(
    pid, cu_seqlens_ptr, chunk_indices_ptr, tokens, sequences,
    CHUNK: tl.constexpr, HAS_INDICES: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """First token and number of tokens (0: nothing to do) of the chunk of packed sequences that `pid` names.

    Without chunk indices sequence s owns the slots from cu[s] // CHUNK + s on, one or two more than it needs at
    most, which every program can search on its own. All values are clamped: whatever the tensors hold, no address
    outside of the tokens comes out.
    """
    if HAS_INDICES:
        sequence = tl.load(chunk_indices_ptr + 2 * pid).to(tl.int64)
        within = tl.load(chunk_indices_ptr + 2 * pid + 1).to(tl.int64)
        sequence = tl.minimum(tl.maximum(sequence, 0), sequences - 1)
    else:
        sequence = tl.full([], -1, tl.int64)
        o_search = tl.arange(0, SEARCH)
        for base in range(0, sequences, SEARCH):
            o_seq = base + o_search
            b_start = tl.load(cu_seqlens_ptr + o_seq, mask=o_seq < sequences, other=0).to(tl.int64)
            b_owned = (o_seq < sequences) & (b_start // CHUNK + o_seq <= pid)
            sequence += tl.sum(b_owned.to(tl.int64), axis=0)
        sequence = tl.maximum(sequence, 0)
        within = pid - sequence - tl.load(cu_seqlens_ptr + sequence).to(tl.int64) // CHUNK
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence).to(tl.int64), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), start), tokens)
    within = tl.minimum(tl.maximum(within, 0), tl.cdiv(tokens, CHUNK))
    first = start + within * CHUNK
    return tl.minimum(first, end), tl.minimum(tl.maximum(end - first, 0), CHUNK)


# Sizes that vary from call to call must not compile the kernel anew.
@triton.jit(do_not_specialize=["tokens", "chunks", "sequences"])
def gate_cumsum_kernel(
    raw_ptr, a_log_ptr, bias_ptr, out_ptr, cu_seqlens_ptr, chunk_indices_ptr,
    raw_offset, tokens, chunks, sequences,
    raw_stride_b, raw_stride_t, raw_stride_g, raw_stride_r, raw_stride_k,
    out_stride_b, out_stride_n, out_stride_c, out_stride_h, out_stride_k,
    SCALE: tl.constexpr, LOWER_BOUND: tl.constexpr, BETA: tl.constexpr, THRESHOLD: tl.constexpr,
    BOUNDED: tl.constexpr, PAD_GATE: tl.constexpr, VARLEN: tl.constexpr,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    A_G: tl.constexpr, A_R: tl.constexpr, A_K: tl.constexpr,
    BIAS_G: tl.constexpr, BIAS_R: tl.constexpr, BIAS_K: tl.constexpr,
    RAW_B: tl.constexpr, RAW_T: tl.constexpr, RAW_G: tl.constexpr, RAW_R: tl.constexpr, RAW_K: tl.constexpr,
    OUT_B: tl.constexpr, OUT_N: tl.constexpr, OUT_C: tl.constexpr, OUT_H: tl.constexpr, OUT_K: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SERIAL: tl.constexpr, SEARCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (lane blocks x chunks x batch,).

    Lane blocks are innermost, so that neighbours read neighbouring memory.

    raw [B, T, G, R, K], a_log and bias [G, R, K], any strides; out [B, N, CHUNK, H, K] by strides, H = G * R. With
    VARLEN, B and N are 1 and `chunks` counts slots: `out_stride_c` then steps through all tokens. A stride comes either
    compiled in (RAW_B and so on) or, where that is -1, as a run-time argument.
    """
    begin(PDL)
    tl.static_assert(CHUNK % ROWS == 0, "ROWS must divide CHUNK")
    H: tl.constexpr = G * R
    lanes_in_all: tl.constexpr = K if K > 1 else H
    blocks: tl.constexpr = (lanes_in_all + LANES - 1) // LANES * (H if K > 1 else 1)
    one = tl.full([], 1, tl.int64)
    tile = tl.program_id(0)
    block = tile % blocks
    o_chunk = tile // blocks

    # Lanes: o_h and o_k are the head and channel of each, one of them the same for the whole program.
    if K > 1:
        blocks_in_head: tl.constexpr = (K + LANES - 1) // LANES
        o_lane = (block % blocks_in_head) * LANES + tl.arange(0, LANES)
        o_k = o_lane
        o_h = block // blocks_in_head
    else:
        o_lane = block * LANES + tl.arange(0, LANES)
        o_k = 0
        o_h = o_lane
    if lanes_in_all % LANES == 0:
        b_lane = tl.full([LANES], 0, tl.int32) == 0
    else:
        b_lane = o_lane < lanes_in_all
    a_lane = _lane_offsets(o_h, o_k, A_G, A_R, A_K, G, R, LANES)
    b_a = tl.load(a_log_ptr + a_lane, mask=b_lane, other=0.0).to(tl.float32)
    b_bias = tl.zeros_like(b_a)
    if bias_ptr is not None:
        bias_lane = _lane_offsets(o_h, o_k, BIAS_G, BIAS_R, BIAS_K, G, R, LANES)
        b_bias = tl.load(bias_ptr + bias_lane, mask=b_lane, other=0.0).to(tl.float32)

    # Rows: the first token, its place in the output, and how many of the CHUNK rows are real tokens.
    raw_row = one * (RAW_T if RAW_T >= 0 else raw_stride_t)
    out_row = one * (OUT_C if OUT_C >= 0 else out_stride_c)
    raw_batch = one * (RAW_B if RAW_B >= 0 else raw_stride_b)
    out_batch = one * (OUT_B if OUT_B >= 0 else out_stride_b)
    out_chunk = one * (OUT_N if OUT_N >= 0 else out_stride_n)
    if VARLEN:
        first_token, valid = _locate_chunk(
            one * o_chunk, cu_seqlens_ptr, chunk_indices_ptr, tokens, sequences, CHUNK, VARLEN == 2, SEARCH
        )
        out_base = first_token * out_row
        o_batch = one * 0
    else:
        o_batch = one * (o_chunk // chunks)
        o_n = one * (o_chunk % chunks)
        first_token = o_n * CHUNK
        valid = tl.minimum(tl.maximum(tokens - first_token, 0), CHUNK)
        out_base = o_batch * out_batch + o_n * out_chunk
    p_raw = raw_ptr + raw_offset + o_batch * raw_batch + first_token * raw_row
    raw_g = RAW_G if RAW_G >= 0 else raw_stride_g
    raw_r = RAW_R if RAW_R >= 0 else raw_stride_r
    raw_k = RAW_K if RAW_K >= 0 else raw_stride_k
    p_raw += _lane_offsets(o_h, o_k, raw_g, raw_r, raw_k, G, R, LANES)
    out_h = OUT_H if OUT_H >= 0 else out_stride_h
    out_k = OUT_K if OUT_K >= 0 else out_stride_k
    p_out = out_ptr + out_base + _lane_offsets(o_h, o_k, 0, out_h, out_k, 1, H, LANES)
    if valid == CHUNK:
        _scan(
            p_raw, p_out, raw_row, out_row, valid, b_lane, b_a, b_bias, SCALE, LOWER_BOUND, BETA, THRESHOLD, BOUNDED,
            CHUNK, ROWS, LANES, False, PAD_GATE, True, SERIAL,
        )  # fmt: skip
    elif VARLEN == 0 or valid > 0:
        _scan(
            p_raw, p_out, raw_row, out_row, valid, b_lane, b_a, b_bias, SCALE, LOWER_BOUND, BETA, THRESHOLD, BOUNDED,
            CHUNK, ROWS, LANES, True, PAD_GATE, VARLEN == 0, SERIAL,
        )  # fmt: skip
