"""Triton kernels of `delta_rule_intra`: the part of a chunked delta rule that needs no state.

A program takes a tile of 64 tokens of one value head: a chunk of 64, or as many chunks of 32 or 16 side by side, whose
system is then block diagonal. It forms

    L_ij = beta_i sum_k k_i k_j exp(G_i - G_j)   (j < i, same chunk),   X = (I + L)^-1

on chip and writes u = X (beta v), w = X (beta k exp G), and where q is given P_ij = scale sum_k q_i k_j exp(G_i - G_j)
for j <= i. Decays are exponentials of differences of G, the sums of log decays within a chunk, so that nothing
overflows however strong a decay is.

* One decay per head (GDN): a factor of the products k k^T and q k^T of the raw inputs, which are exact on tensor cores.
* A decay per channel (KDA): the pair (i, j) belongs to the smallest aligned block that holds both. Per block size, rows
  are multiplied by the decay since the last row of the block's first half, columns by the decay up to it; the product
  is then right for the pairs that lie on both sides of it. Where the decays of a block have inverses in float32, one
  product is right for all pairs of the block, and smaller blocks are not needed.

Floor for K = V = 128 and bfloat16 rows, per token and value head: 1,538 bytes with a decay per channel (k, v, u and w
256 each, G 512, beta 2), 902 with one per head and a key head for two value heads, 512 more where u and w are float32.
With 32 heads and 4,096 tokens on an H200 that is 47 and 28 us (63 and 44 in float32). The 24,600 FLOPs of the triangles
take 4 us, those of whole tiles with operands of two bfloat16 numbers each about 5 times as long.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import begin
from fusion_passes.ops._delta_rule_inverse import inverse
from fusion_passes.ops._delta_rule_prologue import INVERTIBLE, LOG2E, _strength

# Tokens per program.
TILE = tl.constexpr(64)
# Below this, sums are alike: the decay to anything above is 0, and between two of them there is none.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _locate(chunks, HV: tl.constexpr, C: tl.constexpr):
    """(batch row, head, place of the first token of its tile in the padded sequence) of this program.

    Tiles are addressed by a pointer to their first token and 32-bit offsets from there: 64-bit offsets of every row
    would fill the registers.
    """
    pid = tl.program_id(0)
    slot = pid // HV
    tiles = tl.cdiv(chunks, TILE // C)
    return (slot // tiles).to(tl.int64), pid % HV, (slot % tiles).to(tl.int64) * TILE


@triton.jit
def _finite(b_sums):
    """Sums of log decays, float32; -inf becomes `LOWEST`, so that differences are numbers. NaN stays."""
    return tl.where(b_sums < LOWEST, LOWEST, b_sums.to(tl.float32))


@triton.jit
def _decay(b_log):
    """exp of a log decay. The factor comes behind the difference of sums: before it the compiler would contract product
    and difference, which makes the difference of equal sums the rounding of a product."""
    return tl.exp2(b_log * LOG2E)


@triton.jit
def _product(b_x, b_y, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """b_x @ b_y, b_x float32. "bf16": operands are taken as two bfloat16 numbers each, b_y as one where it is EXACT."""
    if PRECISION == "bf16":
        b_x0 = b_x.to(tl.bfloat16)
        b_x1 = (b_x - b_x0.to(tl.float32)).to(tl.bfloat16)
        b_y0 = b_y.to(tl.bfloat16)
        b_out = tl.dot(b_x1, b_y0)
        if not EXACT:
            b_y1 = (b_y - b_y0.to(tl.float32)).to(tl.bfloat16)
            b_out = tl.dot(b_x0, b_y1, b_out)
        b_out = tl.dot(b_x0, b_y0, b_out)
    else:
        b_out = tl.dot(b_x, b_y.to(tl.float32), input_precision=PRECISION)
    return b_out


@triton.jit
def _raw_product(b_x, b_y, PRECISION: tl.constexpr):
    """b_x @ b_y of values as they were loaded."""
    if PRECISION == "bf16":
        b_out = tl.dot(b_x, b_y)
    else:
        b_out = tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), input_precision=PRECISION)
    return b_out


@triton.jit
def _load_again(p_x, o_x, m_x):
    """Numbers [64] that were loaded before, in float32, by what is another load to the compiler.

    One number per column of a tile takes 16 registers of every thread: too many to be kept through the inversion.
    """
    return tl.load(p_x + o_x, mask=m_x, other=0.0, cache_modifier=".ca").to(tl.float32)


@triton.jit
def _load_rows(p_x, o_i, o_d, b_token, stride_t, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Channels `o_d` of rows `o_i` [64, BLOCK], zero behind the last token and the last channel."""
    m_x = b_token[:, None]
    if WIDTH % BLOCK != 0:
        m_x = m_x & (o_d < WIDTH)[None, :]
    return tl.load(p_x + (o_i[:, None] * stride_t + o_d[None, :]), mask=m_x, other=0.0)


@triton.jit
def _diagonal(b_x):
    """The diagonal [64] of a tile."""
    o_i = tl.arange(0, TILE)
    return tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_x, 0.0), axis=1)


@triton.jit
def _store_rows(
    p_out, b_rows, o_i, o_d, b_valid, D: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Channels `o_d` of u or w, of which there are D, into columns FIRST on of a result [N, C, WIDTH].

    With COLUMNS every chunk is stored by columns.
    """
    o_column = FIRST + o_d
    if COLUMNS:
        o_row = (o_i // C) * (C * WIDTH) + o_i % C
        o_out = o_row[:, None] + o_column[None, :] * C
    else:
        o_out = o_i[:, None] * WIDTH + o_column[None, :]
    m_out = b_valid[:, None]
    if D % BLOCK != 0:
        m_out = m_out & (o_d < D)[None, :]
    tl.store(p_out + o_out, b_rows.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _store_pairs(p_out, b_pairs, b_valid, stride_n, C: tl.constexpr):
    """The chunks' own blocks of pairs [64, 64], zero above the diagonal, into blocks [C, C] of a result."""
    o_i = tl.arange(0, TILE)
    b_own = (o_i[:, None] // C == o_i[None, :] // C) & b_valid[:, None]
    b_pairs = tl.where(o_i[:, None] >= o_i[None, :], b_pairs, 0.0)
    o_out = ((o_i // C) * stride_n + (o_i % C) * C)[:, None] + (o_i % C)[None, :]
    tl.store(p_out + o_out, b_pairs.to(p_out.dtype.element_ty), mask=b_own)


@triton.jit
def _solved(b_kk, b_beta, C: tl.constexpr, SOLVE: tl.constexpr):
    """(I + L)^-1 [64, 64] from sum_k k_i k_j exp(G_i - G_j)."""
    o_i = tl.arange(0, TILE)
    b_below = (o_i[:, None] > o_i[None, :]) & (o_i[:, None] // C == o_i[None, :] // C)
    return inverse(tl.where(b_below, b_kk * b_beta[:, None], 0.0), SOLVE)


@triton.jit
def _store_values(
    p_v, p_u, b_x, o_i, b_token, b_valid, v_stride_t,
    V: tl.constexpr, BV: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u = X beta v, BV columns at a time."""
    for start in tl.static_range(0, V, BV):
        o_v = start + tl.arange(0, BV)
        b_v = _load_rows(p_v, o_i, o_v, b_token, v_stride_t, V, BV)
        b_u = _product(b_x, b_v, PRECISION, True)
        _store_rows(p_u, b_u, o_i, o_v, b_valid, V, BV, FIRST, WIDTH, COLUMNS, C)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def delta_rule_intra_per_head_kernel(
    k_ptr, v_ptr, sums_ptr, beta_ptr, q_ptr, u_ptr, w_ptr, pairs_ptr,
    k_offset, v_offset, sums_offset, beta_offset, q_offset, tokens, chunks,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    sums_stride_b, sums_stride_h, sums_stride_n, sums_stride_c, beta_stride_b, beta_stride_t, beta_stride_h,
    q_stride_b, q_stride_t, q_stride_h, pairs_stride_h, pairs_stride_n,
    SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    U_WIDTH: tl.constexpr, U_FIRST: tl.constexpr, W_WIDTH: tl.constexpr, W_FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    SOLVE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (B * tiles of 64 tokens * HV,). One decay per value head.

    k, q [B, T, HK, K], v [B, T, HV, V], beta [B, T, HV], sums [B, HV, N, C]. u and w are columns U_FIRST and W_FIRST on
    of results [B, HV, N, C, U_WIDTH or W_WIDTH], pairs holds blocks [C, C] of every chunk by strides.
    """
    begin(PDL)
    tl.static_assert(TILE % C == 0 and C >= 16, "a tile holds whole chunks")
    tl.static_assert(BK >= 64 and BV >= 64, "blocks of fewer channels go wrong on sm_90 with Triton 3.6")
    row, head, first = _locate(chunks, HV, C)
    o_i = tl.arange(0, TILE)
    b_valid = o_i < chunks * C - first
    b_token = o_i < tokens - first
    p_sums = sums_ptr + sums_offset + row * sums_stride_b + head * sums_stride_h + (first // C) * sums_stride_n
    o_sums = (o_i // C) * sums_stride_n + (o_i % C) * sums_stride_c
    b_sums = _finite(tl.load(p_sums + o_sums, mask=b_valid, other=0.0))
    p_beta = beta_ptr + beta_offset + row * beta_stride_b + first * beta_stride_t + head * beta_stride_h
    b_beta = _strength(p_beta, o_i * beta_stride_t, b_token, False, 1.0)
    key_head = head // (HV // HK)
    p_k = k_ptr + k_offset + row * k_stride_b + first * k_stride_t + key_head * k_stride_h
    b_kk = tl.zeros([TILE, TILE], tl.float32)
    b_qk = tl.zeros([TILE, TILE], tl.float32)
    b_qq = tl.zeros([TILE], tl.float32)
    for start in tl.static_range(0, K, BK):
        o_k = start + tl.arange(0, BK)
        b_k = _load_rows(p_k, o_i, o_k, b_token, k_stride_t, K, BK)
        b_kk += _raw_product(b_k, tl.trans(b_k), PRECISION)
        if pairs_ptr is not None:
            p_q = q_ptr + q_offset + row * q_stride_b + first * q_stride_t + key_head * q_stride_h
            b_q = _load_rows(p_q, o_i, o_k, b_token, q_stride_t, K, BK)
            b_qk += _raw_product(b_q, tl.trans(b_k), PRECISION)
            b_wide = b_q.to(tl.float32)
            b_qq += tl.sum(b_wide * b_wide, axis=1)
    b_rk = tl.full([TILE], 1.0, tl.float32)
    b_rq = tl.full([TILE], SCALE, tl.float32)
    if NORM:
        b_rk = tl.rsqrt(_diagonal(b_kk) + EPS)
        b_rq *= tl.rsqrt(b_qq + EPS)
    b_lower = (o_i[:, None] >= o_i[None, :]) & (o_i[:, None] // C == o_i[None, :] // C)
    b_between = _decay(tl.where(b_lower, b_sums[:, None] - b_sums[None, :], 0.0)) * b_rk[None, :]
    head_row = row * HV + head
    if pairs_ptr is not None:
        p_pairs = pairs_ptr + head_row * pairs_stride_h + (first // C) * pairs_stride_n
        _store_pairs(p_pairs, b_qk * b_between * b_rq[:, None], b_valid, pairs_stride_n, C)
    b_x = _solved(b_kk * b_between * b_rk[:, None], b_beta, C, SOLVE)
    b_x *= _load_again(p_beta, o_i * beta_stride_t, b_token)[None, :]
    p_v = v_ptr + v_offset + row * v_stride_b + first * v_stride_t + head * v_stride_h
    out_row = head_row * (chunks * C) + first
    p_u = u_ptr + out_row * U_WIDTH
    _store_values(p_v, p_u, b_x, o_i, b_token, b_valid, v_stride_t, V, BV, U_WIDTH, U_FIRST, COLUMNS, C, PRECISION)
    if w_ptr is None:
        p_w = u_ptr + out_row * W_WIDTH
    else:
        p_w = w_ptr + out_row * W_WIDTH
    b_x *= (_decay(_finite(_load_again(p_sums, o_sums, b_valid))) * b_rk)[None, :]
    for start in tl.static_range(0, K, BK):
        o_k = start + tl.arange(0, BK)
        b_k = _load_rows(p_k, o_i, o_k, b_token, k_stride_t, K, BK)
        b_w = _product(b_x, b_k, PRECISION, True)
        _store_rows(p_w, b_w, o_i, o_k, b_valid, K, BK, W_FIRST, W_WIDTH, COLUMNS, C)


@triton.jit
def _load_sums(
    p_sums, o_i, o_k, b_valid, sums_stride_n, sums_stride_c, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr
):
    """Sums [rows o_i, channels o_k], zero behind the last chunk and the last channel."""
    m_sums = b_valid[:, None]
    if K % BK != 0:
        m_sums = m_sums & (o_k < K)[None, :]
    o_row = (o_i // C) * sums_stride_n + (o_i % C) * sums_stride_c
    b_sums = tl.load(p_sums + (o_row[:, None] + o_k[None, :]), mask=m_sums, other=0.0)
    return _finite(b_sums)


@triton.jit
def _middle(o_i, half):
    """The last row of the first half of the block of 2 * half rows that row o_i lies in."""
    return (o_i | (2 * half - 1)) - half


@triton.jit
def _survey(
    p_k, p_q, p_sums, o_i, b_token, b_valid, k_stride_t, q_stride_t, sums_stride_n, sums_stride_c,
    PAIRS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Squares of keys and of queries, their products in a row, how many block sizes are needed, and whether not all.

    Where sums are near those of the middle of a block, all pairs of that block are right at once.
    """
    b_squares = tl.zeros([TILE], tl.float32)
    b_qq = tl.zeros([TILE], tl.float32)
    b_diagonal = tl.zeros([TILE], tl.float32)
    far_whole = tl.full([TILE], 0.0, tl.float32)
    far_half = tl.full([TILE], 0.0, tl.float32)
    for start in tl.static_range(0, K, BK):
        o_k = start + tl.arange(0, BK)
        b_key = _load_rows(p_k, o_i, o_k, b_token, k_stride_t, K, BK)
        b_key = b_key.to(tl.float32)
        b_squares += tl.sum(b_key * b_key, axis=1)
        b_sums = _load_sums(p_sums, o_i, o_k, b_valid, sums_stride_n, sums_stride_c, K, BK, C)
        b_middle = _load_sums(p_sums, _middle(o_i, C // 2), o_k, b_valid, sums_stride_n, sums_stride_c, K, BK, C)
        far_whole = tl.maximum(far_whole, tl.max(tl.abs(b_sums - b_middle), axis=1))
        b_middle = _load_sums(p_sums, _middle(o_i, C // 4), o_k, b_valid, sums_stride_n, sums_stride_c, K, BK, C)
        far_half = tl.maximum(far_half, tl.max(tl.abs(b_sums - b_middle), axis=1))
        if PAIRS:
            b_query = _load_rows(p_q, o_i, o_k, b_token, q_stride_t, K, BK)
            b_query = b_query.to(tl.float32)
            b_qq += tl.sum(b_query * b_query, axis=1)
            b_diagonal += tl.sum(b_query * b_key, axis=1)
    ALL: tl.constexpr = 6 if C == 64 else 5 if C == 32 else 4
    levels = tl.where(tl.max(far_half, axis=0) * LOG2E <= -INVERTIBLE, 2, ALL)
    levels = tl.where(tl.max(far_whole, axis=0) * LOG2E <= -INVERTIBLE, 1, levels)
    return b_squares, b_qq, b_diagonal, levels, levels < ALL


@triton.jit(do_not_specialize=["tokens", "chunks"])
def delta_rule_intra_per_channel_kernel(
    k_ptr, v_ptr, sums_ptr, beta_ptr, q_ptr, u_ptr, w_ptr, pairs_ptr,
    k_offset, v_offset, sums_offset, beta_offset, q_offset, tokens, chunks,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    sums_stride_b, sums_stride_h, sums_stride_n, sums_stride_c, beta_stride_b, beta_stride_t, beta_stride_h,
    q_stride_b, q_stride_t, q_stride_h, pairs_stride_h, pairs_stride_n,
    SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    U_WIDTH: tl.constexpr, U_FIRST: tl.constexpr, W_WIDTH: tl.constexpr, W_FIRST: tl.constexpr, COLUMNS: tl.constexpr,
    SOLVE: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (B * tiles of 64 tokens * HV,). A decay per channel: sums are [B, HV, N, C, K], the rest as per head."""
    begin(PDL)
    tl.static_assert(TILE % C == 0 and C >= 16, "a tile holds whole chunks")
    tl.static_assert(BK >= 64 and BV >= 64, "blocks of fewer channels go wrong on sm_90 with Triton 3.6")
    operand: tl.constexpr = tl.bfloat16 if PRECISION == "bf16" else tl.float32
    row, head, first = _locate(chunks, HV, C)
    o_i = tl.arange(0, TILE)
    b_valid = o_i < chunks * C - first
    b_token = o_i < tokens - first
    p_beta = beta_ptr + beta_offset + row * beta_stride_b + first * beta_stride_t + head * beta_stride_h
    b_beta = _strength(p_beta, o_i * beta_stride_t, b_token, False, 1.0)
    key_head = head // (HV // HK)
    p_k = k_ptr + k_offset + row * k_stride_b + first * k_stride_t + key_head * k_stride_h
    p_sums = sums_ptr + sums_offset + row * sums_stride_b + head * sums_stride_h + (first // C) * sums_stride_n
    p_q = p_k
    if pairs_ptr is not None:
        p_q = q_ptr + q_offset + row * q_stride_b + first * q_stride_t + key_head * q_stride_h

    b_squares, b_qq, b_diagonal, levels, fewer = _survey(
        p_k, p_q, p_sums, o_i, b_token, b_valid, k_stride_t, q_stride_t, sums_stride_n, sums_stride_c,
        pairs_ptr is not None, K, BK, C,
    )  # fmt: skip
    b_rk = tl.full([TILE], 1.0, tl.float32)
    b_rq = tl.full([TILE], SCALE, tl.float32)
    if NORM:
        b_rk = tl.rsqrt(b_squares + EPS)
        b_rq *= tl.rsqrt(b_qq + EPS)

    b_kk = tl.zeros([TILE, TILE], tl.float32)
    b_qk = tl.zeros([TILE, TILE], tl.float32)
    for level in tl.range(0, levels, num_stages=1):
        half = (C // 2) >> level
        # In the last of fewer levels all pairs of a block are right, with decays before the middle above one.
        both = fewer & (level == levels - 1)
        o_middle = _middle(o_i, half)
        b_after = (o_i > o_middle)[:, None]
        b_kk_here = tl.zeros([TILE, TILE], tl.float32)
        b_qk_here = tl.zeros([TILE, TILE], tl.float32)
        for start in tl.static_range(0, K, BK):
            o_k = start + tl.arange(0, BK)
            b_sums = _load_sums(p_sums, o_i, o_k, b_valid, sums_stride_n, sums_stride_c, K, BK, C)
            b_middle = _load_sums(p_sums, o_middle, o_k, b_valid, sums_stride_n, sums_stride_c, K, BK, C)
            b_since = b_sums - b_middle
            # Rows before the middle and columns after it belong to no pair across it.
            b_row = _decay(tl.where(b_after | both, b_since, 0.0))
            b_column = _decay(tl.where(b_after & (both == 0), 0.0, -b_since))
            b_k = _load_rows(p_k, o_i, o_k, b_token, k_stride_t, K, BK)
            b_kt = tl.trans((b_k.to(tl.float32) * b_column).to(operand))
            b_kk_here += _raw_product((b_k.to(tl.float32) * b_row).to(operand), b_kt, PRECISION)
            if pairs_ptr is not None:
                b_q = _load_rows(p_q, o_i, o_k, b_token, q_stride_t, K, BK)
                b_qk_here += _raw_product((b_q.to(tl.float32) * b_row).to(operand), b_kt, PRECISION)
        b_within = (o_i[:, None] ^ o_i[None, :]) < 2 * half
        b_kk = tl.where(b_within, b_kk_here, b_kk)
        b_qk = tl.where(b_within, b_qk_here, b_qk)

    head_row = row * HV + head
    if pairs_ptr is not None:
        b_qk = tl.where(o_i[:, None] == o_i[None, :], b_diagonal[:, None], b_qk)
        p_pairs = pairs_ptr + head_row * pairs_stride_h + (first // C) * pairs_stride_n
        _store_pairs(p_pairs, b_qk * (b_rq[:, None] * b_rk[None, :]), b_valid, pairs_stride_n, C)
    b_x = _solved(b_kk * (b_rk[:, None] * b_rk[None, :]), b_beta, C, SOLVE)
    b_x *= _load_again(p_beta, o_i * beta_stride_t, b_token)[None, :]
    p_v = v_ptr + v_offset + row * v_stride_b + first * v_stride_t + head * v_stride_h
    out_row = head_row * (chunks * C) + first
    p_u = u_ptr + out_row * U_WIDTH
    _store_values(p_v, p_u, b_x, o_i, b_token, b_valid, v_stride_t, V, BV, U_WIDTH, U_FIRST, COLUMNS, C, PRECISION)
    if w_ptr is None:
        p_w = u_ptr + out_row * W_WIDTH
    else:
        p_w = w_ptr + out_row * W_WIDTH
    b_x *= b_rk[None, :]
    for start in tl.static_range(0, K, BK):
        o_k = start + tl.arange(0, BK)
        b_k = _load_rows(p_k, o_i, o_k, b_token, k_stride_t, K, BK)
        b_e = _decay(_load_sums(p_sums, o_i, o_k, b_valid, sums_stride_n, sums_stride_c, K, BK, C))
        b_w = _product(b_x, b_k.to(tl.float32) * b_e, PRECISION, False)
        _store_rows(p_w, b_w, o_i, o_k, b_valid, K, BK, W_FIRST, W_WIDTH, COLUMNS, C)
