"""Triton kernels of the chunk-parallel half of `chunk_delta_rule`: everything that does not need the state.

A program takes one chunk of 64 tokens of one value head and writes, for the scan,

    A_ij  = ((I + L)^-1)_ij beta_j,   L_ij = beta_i sum_k k_i k_j exp(G_i - G_j)   (j < i)
    Aq_ij = scale sum_k q_i k_j exp(G_i - G_j)                                     (j <= i)

with G the cumulative log decay within the chunk. Decays are always taken of sums over an interval of tokens, which are
negative, so that nothing overflows however strong the decay is; no decay matrix goes to memory.

* One decay per head (GDN): the decay is a factor of the products k k^T and q k^T of the raw inputs, which are exact on
  tensor cores. The l2 norms, scale and decays of the rows go to the scan as float32 factors.
* A decay per channel (KDA): the pair (i, j) belongs to the smallest aligned block that holds both. Per block size, rows
  are multiplied by the decay between them and the middle of their block, which is one product with a 0/1 matrix and one
  exponential; the product of the rows is then right for the pairs that lie on both sides of a middle. Six sizes cover
  all pairs. The decayed rows themselves go to the scan: k exp(G), scale q exp(G), k exp(G_last - G).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import log2_1p_exp, log2_1p_exp2, sigmoid_exp2, start_next
from fusion_passes.ops._delta_rule_inverse import inverse

LOG2E = tl.constexpr(1.4426950408889634)
# Tokens per chunk.
CHUNK = tl.constexpr(64)
# 2^-192 is zero in float32: a stronger decay is the same, and bounded sums keep their digits.
STRONGEST = tl.constexpr(-192.0)
# Up to 2^-64 the inverse of a decay, times any key, is far from overflow.
INVERTIBLE = tl.constexpr(-64.0)


@triton.jit
def locate_chunk(slot, cu_seqlens_ptr, tokens, sequences, VARLEN: tl.constexpr, SEARCH: tl.constexpr):
    """(batch row, first token, number of tokens) of the chunk with this slot.

    Dense: `tokens` per row, slots row by row. Packed: sequence s owns the slots from cu[s] // CHUNK + s on, one or two
    more than it needs at most; superfluous ones have no tokens.
    """
    if VARLEN:
        sequence = tl.full([], -1, tl.int64)
        o_search = tl.arange(0, SEARCH)
        for base in range(0, sequences, SEARCH):
            o_seq = base + o_search
            b_start = tl.load(cu_seqlens_ptr + o_seq, mask=o_seq < sequences, other=0).to(tl.int64)
            b_owned = (o_seq < sequences) & (b_start // CHUNK + o_seq <= slot)
            sequence += tl.sum(b_owned.to(tl.int64), axis=0)
        sequence = tl.maximum(sequence, 0)
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence).to(tl.int64), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), start), tokens)
        first = start + (slot - sequence - start // CHUNK) * CHUNK
        row = first * 0
        valid = tl.minimum(tl.maximum(end - first, 0), CHUNK)
        first = tl.minimum(first, end)
    else:
        chunks = tl.cdiv(tokens, CHUNK)
        row = (slot // chunks).to(tl.int64)
        first = (slot % chunks).to(tl.int64) * CHUNK
        valid = tl.minimum(tokens - first, CHUNK)
    return row, first, valid


@triton.jit
def _log2_decay(b_g, b_a, b_bias, LOWER_BOUND: tl.constexpr, GATE: tl.constexpr, EXACT: tl.constexpr):
    """Base-2 log decay from the gate's input: "log", "softplus" or "bounded".

    EXACT keeps softplus to one part in a million, else in 10^5. Above 20 both are the argument to float32's precision,
    with a threshold there or without.
    """
    if GATE == "softplus":
        b_z = b_g + b_bias
        if EXACT:
            b_softplus = log2_1p_exp2(b_z * LOG2E)
        else:
            b_softplus = log2_1p_exp(b_z)
        b_decay = tl.exp2(b_a * LOG2E) * -b_softplus
    elif GATE == "bounded":
        b_decay = sigmoid_exp2((b_g + b_bias) * (tl.exp2(b_a * LOG2E) * -LOG2E)) * (LOWER_BOUND * LOG2E)
    else:
        b_decay = b_g * LOG2E
    return tl.where(b_decay < STRONGEST, STRONGEST, b_decay)


@triton.jit
def _strength(p_beta, o_beta, b_token, SIGMOID: tl.constexpr, FACTOR: tl.constexpr):
    """beta [64] in float32, zero behind the end."""
    b_beta = tl.load(p_beta + o_beta, mask=b_token, other=0.0).to(tl.float32)
    if SIGMOID:
        b_beta = tl.where(b_token, sigmoid_exp2(b_beta * -LOG2E) * FACTOR, 0.0)
    return b_beta


@triton.jit
def _row_products(b_x, b_y, PRECISION: tl.constexpr):
    """sum_k x_k y_k of each row, [64]: the diagonal of a product, which tensor cores give sooner than sums of a row."""
    o_t = tl.arange(0, CHUNK)
    b_product = tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
    return tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_product, 0.0), axis=1)


@triton.jit
def _inverse_norm(b_x, NORM: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr):
    """1 / sqrt(sum x^2 + eps) of each row, or ones."""
    if NORM:
        b_factor = tl.rsqrt(_row_products(b_x, b_x, PRECISION) + EPS)
    else:
        b_factor = tl.full([CHUNK], 1.0, tl.float32)
    return b_factor


@triton.jit
def _running_sums(b_decay, EXACT: tl.constexpr):
    """Cumulative log decays [64] in two parts.

    With EXACT the first part is a multiple of 2^-10, whose sums and differences are exact, so that a strong decay does
    not cost weak ones their digits. Else the second part is zero.
    """
    b_coarse = b_decay
    b_rest = tl.zeros_like(b_decay)
    if EXACT:
        b_coarse = tl.floor(b_decay * 1024.0) * (1.0 / 1024.0)
        b_rest = tl.cumsum(b_decay - b_coarse, axis=0)
    return tl.cumsum(b_coarse, axis=0), b_rest


@triton.jit(do_not_specialize=["tokens", "sequences"])
def delta_rule_prologue_per_head_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, a_log_ptr, bias_ptr, cu_seqlens_ptr, tiles_ptr, factors_ptr,
    q_offset, k_offset, g_offset, beta_offset, tokens, sequences,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, GATE: tl.constexpr, LOWER_BOUND: tl.constexpr,
    SIGMOID: tl.constexpr, BETA_FACTOR: tl.constexpr, VARLEN: tl.constexpr, SEARCH: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, A_H: tl.constexpr, BIAS_H: tl.constexpr,
    SOLVE: tl.constexpr, PRECISION: tl.constexpr, LEADS: tl.constexpr,
):  # fmt: skip
    """Grid: (slots * HV,). One decay per value head.

    q, k [B, T, HK, K], g and beta [B, T, HV], a_log and bias [HV]. Writes tiles [slots, HV, 2, 64, 64] (A, Aq) and
    factors [slots, HV, 4, 64] float32: of k S, of q S, of v' on its way into the state, and first the chunk's decay.
    """
    pid = tl.program_id(0)
    head = pid % HV
    slot = pid // HV
    row, first, valid = locate_chunk(slot, cu_seqlens_ptr, tokens, sequences, VARLEN, SEARCH)
    o_t = tl.arange(0, CHUNK)
    o_k = tl.arange(0, BK)
    b_token = o_t < valid
    b_mask = b_token[:, None] & (o_k < K)[None, :]
    o_row = first + o_t
    key_head = head // (HV // HK)
    p_k = k_ptr + k_offset + row * k_stride_b + key_head * k_stride_h
    p_q = q_ptr + q_offset + row * q_stride_b + key_head * q_stride_h
    b_k = tl.load(p_k + o_row[:, None] * k_stride_t + o_k[None, :], mask=b_mask, other=0.0)
    b_q = tl.load(p_q + o_row[:, None] * q_stride_t + o_k[None, :], mask=b_mask, other=0.0)
    o_g = g_offset + row * g_stride_b + o_row * g_stride_t + head * g_stride_h
    b_g = tl.load(g_ptr + o_g, mask=b_token, other=0.0).to(tl.float32)
    o_beta = beta_offset + row * beta_stride_b + o_row * beta_stride_t + head * beta_stride_h
    b_beta = _strength(beta_ptr, o_beta, b_token, SIGMOID, BETA_FACTOR)
    b_a = 0.0
    b_bias = 0.0
    if a_log_ptr is not None:
        b_a = tl.load(a_log_ptr + head * A_H).to(tl.float32)
    if bias_ptr is not None:
        b_bias = tl.load(bias_ptr + head * BIAS_H).to(tl.float32)
    b_decay = tl.where(b_token, _log2_decay(b_g, b_a, b_bias, LOWER_BOUND, GATE, True), 0.0)
    b_rk = _inverse_norm(b_k, NORM, EPS, PRECISION)
    b_rq = _inverse_norm(b_q, NORM, EPS, PRECISION) * SCALE
    b_sum, b_rest = _running_sums(b_decay, tiles_ptr.dtype.element_ty == tl.float32)
    b_start = tl.exp2(b_sum + b_rest)
    total = tl.sum(tl.where(o_t == CHUNK - 1, b_sum, 0.0), axis=0)
    rest = tl.sum(tl.where(o_t == CHUNK - 1, b_rest, 0.0), axis=0)
    p_factors = factors_ptr + pid.to(tl.int64) * (4 * CHUNK) + o_t
    tl.store(p_factors, b_start * b_rk)
    tl.store(p_factors + CHUNK, b_start * b_rq)
    tl.store(p_factors + 2 * CHUNK, tl.exp2((total - b_sum) + (rest - b_rest)) * b_rk)
    tl.store(factors_ptr + pid.to(tl.int64) * (4 * CHUNK) + 3 * CHUNK, tl.exp2(total + rest))

    b_lower = o_t[:, None] >= o_t[None, :]
    b_between = (b_sum[:, None] - b_sum[None, :]) + (b_rest[:, None] - b_rest[None, :])
    b_pairs = tl.exp2(tl.where(b_lower, b_between, 0.0)) * b_rk[None, :]
    p_tile = tiles_ptr + pid.to(tl.int64) * (2 * CHUNK * CHUNK) + o_t[:, None] * CHUNK + o_t[None, :]
    b_aq = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_pairs * b_rq[:, None]
    tl.store(p_tile + CHUNK * CHUNK, tl.where(b_lower, b_aq, 0.0).to(tiles_ptr.dtype.element_ty))
    b_l = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_pairs * (b_beta * b_rk)[:, None]
    b_l = tl.where(o_t[:, None] > o_t[None, :], b_l, 0.0)
    start_next(LEADS)
    tl.store(p_tile, (inverse(b_l, SOLVE) * b_beta[None, :]).to(tiles_ptr.dtype.element_ty))


@triton.jit
def _interval_sums(b_weights, b_decay, PRECISION: tl.constexpr):
    """Sums of log decays over intervals of tokens: b_weights [64, 64] is 1 (or -1) for the tokens that row i takes."""
    return tl.dot(b_weights.to(b_decay.dtype), b_decay, input_precision=PRECISION)


@triton.jit
def _block_sizes(b_decay, BK: tl.constexpr):
    """How many block sizes, from 64 down, get products: all six, or up to the first whose decays have inverses."""
    b_blocks = tl.sum(tl.reshape(b_decay, [4, 16, BK]), axis=1)
    strongest_16 = tl.min(tl.min(b_blocks, axis=1), axis=0)
    strongest_32 = tl.min(tl.min(tl.sum(tl.reshape(b_blocks, [2, 2, BK]), axis=1), axis=1), axis=0)
    return tl.where(strongest_32 >= INVERTIBLE, 1, tl.where(strongest_16 >= INVERTIBLE, 2, 6))


@triton.jit
def _products(b_k, b_q, b_decay, sizes, o_i, o_j, PRECISION: tl.constexpr):
    """k k^T and q k^T [64, 64] with the decay between the two tokens of every pair below the diagonal.

    The products of one block size are right for the pairs across a middle; smaller blocks overwrite the others. In
    the last of fewer than six sizes all pairs of a block are right: there rows are multiplied by the decay since the
    middle, which is above one before it, and columns by its inverse.
    """
    b_kk = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_qk = tl.zeros([CHUNK, CHUNK], tl.float32)
    for level in tl.range(0, sizes, num_stages=1):
        half = 32 >> level
        last = (sizes < 6) & (level == sizes - 1)
        sign = tl.where(last, -1.0, 1.0)
        # The last row of the lower half of the block that row i lies in.
        o_middle = (o_i | (2 * half - 1)) - half
        b_between = (o_j > tl.minimum(o_i, o_middle)) & (o_j <= tl.maximum(o_i, o_middle))
        b_sum = _interval_sums(tl.where(b_between, tl.where(o_i > o_middle, 1.0, sign), 0.0), b_decay, PRECISION)
        b_row = tl.exp2(b_sum).to(b_k.dtype)
        b_kt = tl.trans((b_k.to(tl.float32) * tl.exp2(b_sum * sign)).to(b_k.dtype))
        b_within = (o_i ^ o_j) < 2 * half
        b_kk = tl.where(b_within, tl.dot(b_k * b_row, b_kt, input_precision=PRECISION), b_kk)
        b_qk = tl.where(b_within, tl.dot(b_q * b_row, b_kt, input_precision=PRECISION), b_qk)
    return b_kk, b_qk


@triton.jit(do_not_specialize=["tokens", "sequences"])
def delta_rule_prologue_per_channel_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, a_log_ptr, bias_ptr, cu_seqlens_ptr, tiles_ptr, rows_ptr, decay_ptr,
    q_offset, k_offset, g_offset, beta_offset, tokens, sequences,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    g_stride_b, g_stride_t, g_stride_h, beta_stride_b, beta_stride_t, beta_stride_h,
    SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, GATE: tl.constexpr, LOWER_BOUND: tl.constexpr,
    SIGMOID: tl.constexpr, BETA_FACTOR: tl.constexpr, VARLEN: tl.constexpr, SEARCH: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    A_H: tl.constexpr, A_K: tl.constexpr, BIAS_H: tl.constexpr, BIAS_K: tl.constexpr,
    SOLVE: tl.constexpr, PRECISION: tl.constexpr, LEADS: tl.constexpr,
):  # fmt: skip
    """Grid: (slots * HV,). A decay per channel.

    q, k [B, T, HK, K], g [B, T, HV, K], beta [B, T, HV]; a_log and bias [HV, K], by strides.
    Writes tiles [slots, HV, 2, 64, 64] (A, Aq), rows [slots, HV, 3, 64, BK] (k exp G, scale q exp G,
    k exp(G_last - G), normalised) and decay [slots, HV, BK] float32 (exp G_last).
    """
    operand: tl.constexpr = tiles_ptr.dtype.element_ty
    # 11 bits of a log decay are enough where its exponential is rounded to 8.
    log_decay: tl.constexpr = tl.float16 if operand == tl.bfloat16 else tl.float32
    pid = tl.program_id(0)
    head = pid % HV
    slot = pid // HV
    row, first, valid = locate_chunk(slot, cu_seqlens_ptr, tokens, sequences, VARLEN, SEARCH)
    o_t = tl.arange(0, CHUNK)
    o_k = tl.arange(0, BK)
    b_token = o_t < valid
    b_channel = o_k < K
    b_mask = b_token[:, None] & b_channel[None, :]
    o_row = first + o_t
    key_head = head // (HV // HK)
    p_g = g_ptr + g_offset + row * g_stride_b + head * g_stride_h
    b_g = tl.load(p_g + o_row[:, None] * g_stride_t + o_k[None, :], mask=b_mask, other=0.0).to(tl.float32)
    p_k = k_ptr + k_offset + row * k_stride_b + key_head * k_stride_h
    p_q = q_ptr + q_offset + row * q_stride_b + key_head * q_stride_h
    b_k = tl.load(p_k + o_row[:, None] * k_stride_t + o_k[None, :], mask=b_mask, other=0.0)
    b_q = tl.load(p_q + o_row[:, None] * q_stride_t + o_k[None, :], mask=b_mask, other=0.0)
    b_rk = _inverse_norm(b_k, NORM, EPS, PRECISION)
    b_rq = _inverse_norm(b_q, NORM, EPS, PRECISION) * SCALE
    b_diagonal = _row_products(b_q, b_k, PRECISION)
    o_beta = beta_offset + row * beta_stride_b + o_row * beta_stride_t + head * beta_stride_h
    b_beta = _strength(beta_ptr, o_beta, b_token, SIGMOID, BETA_FACTOR)
    b_a = tl.zeros([BK], tl.float32)
    b_bias = tl.zeros([BK], tl.float32)
    if a_log_ptr is not None:
        b_a = tl.load(a_log_ptr + head * A_H + o_k * A_K, mask=b_channel, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        b_bias = tl.load(bias_ptr + head * BIAS_H + o_k * BIAS_K, mask=b_channel, other=0.0).to(tl.float32)
    b_decay = _log2_decay(b_g, b_a[None, :], b_bias[None, :], LOWER_BOUND, GATE, operand == tl.float32)
    b_decay = tl.where(b_mask, b_decay, 0.0)
    sizes = _block_sizes(b_decay, BK)
    tl.store(decay_ptr + pid.to(tl.int64) * BK + o_k, tl.exp2(tl.sum(b_decay, axis=0)))
    b_decay = b_decay.to(log_decay)

    o_i = o_t[:, None]
    o_j = o_t[None, :]
    b_k = b_k.to(operand)
    b_q = b_q.to(operand)
    p_rows = rows_ptr + pid.to(tl.int64) * (3 * CHUNK * BK) + o_i * BK + o_k[None, :]
    b_e = tl.exp2(_interval_sums(tl.where(o_j <= o_i, 1.0, 0.0), b_decay, PRECISION))
    tl.store(p_rows, b_k * (b_e * b_rk[:, None]).to(operand))
    tl.store(p_rows + CHUNK * BK, (b_q.to(tl.float32) * b_e * b_rq[:, None]).to(operand))
    b_e = tl.exp2(_interval_sums(tl.where(o_j > o_i, 1.0, 0.0), b_decay, PRECISION))
    tl.store(p_rows + 2 * CHUNK * BK, (b_k.to(tl.float32) * b_e * b_rk[:, None]).to(operand))

    b_kk, b_qk = _products(b_k, b_q, b_decay, sizes, o_i, o_j, PRECISION)
    b_qk = tl.where(o_i == o_j, b_diagonal[:, None], b_qk) * (b_rq[:, None] * b_rk[None, :])
    p_tile = tiles_ptr + pid.to(tl.int64) * (2 * CHUNK * CHUNK) + o_i * CHUNK + o_j
    tl.store(p_tile + CHUNK * CHUNK, tl.where(o_i >= o_j, b_qk, 0.0).to(operand))
    b_l = tl.where(o_i > o_j, b_kk * ((b_beta * b_rk)[:, None] * b_rk[None, :]), 0.0)
    start_next(LEADS)
    tl.store(p_tile, (inverse(b_l, SOLVE) * b_beta[None, :]).to(operand))
