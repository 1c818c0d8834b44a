"""The kernel of `qkv_split`: one launch that copies windows of the columns of a matrix to tensors of their own.

The input lies in memory either row by row (neighbouring columns next to each other: a plain copy) or column by column
(neighbouring tokens next to each other, as a convolution over time leaves it: every tile is transposed in shared
memory). Loads and stores are 16 bytes wide on both sides wherever addresses allow it, which is tested at run time
where it is not known before: one binary serves every number of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusion_passes.ops._common import begin

# Windows of one launch; an op with more takes several launches.
MOST_WINDOWS = 6


@triton.jit
def _load_tile(
    p_x, o_token, o_column, first_token, tokens, x_token, x_column, aligned, START: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """[ROWS, LANES] elements of the window of WIDTH columns that begins at START.

    `aligned`: the stride between rows (of whatever runs along memory) is a multiple of VECTOR. Dividing by VECTOR and
    multiplying again says so to the compiler.
    """
    column = (START + o_column).to(tl.int64)
    token = o_token.to(tl.int64)
    if TRANSPOSED:
        m_column = (o_column < WIDTH)[:, None]
        # A vector exists as a whole or not at all: up to the last whole one, and further if that is the end.
        whole = tokens // VECTOR * VECTOR
        if aligned & ((first_token + ROWS <= whole) | (tokens == whole)):
            wide = column * (x_column // VECTOR * VECTOR)
            m_token = (o_token < whole)[None, :]
            b_turned = tl.load(p_x + wide[:, None] + o_token[None, :], mask=m_column & m_token)
        else:
            m_token = (o_token < tokens)[None, :]
            b_turned = tl.load(p_x + (column * x_column)[:, None] + o_token[None, :], mask=m_column & m_token)
        b_x = tl.trans(b_turned)
    else:
        m_x = (o_token < tokens)[:, None]
        if WIDTH % LANES != 0:
            m_x = m_x & (o_column < WIDTH)[None, :]
        if aligned:
            p_wide = p_x + (token * (x_token // VECTOR * VECTOR))[:, None] + (START + o_column)[None, :]
            b_x = tl.load(p_wide, mask=m_x)
        else:
            p_narrow = p_x + (token * x_token)[:, None] + (column * x_column)[None, :]
            b_x = tl.load(p_narrow, mask=m_x)
    return b_x


@triton.jit
def _copy_tile(
    p_x, out_ptr, block, batch, first_token, tokens, x_token, x_column, aligned, START: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, REPEATS: tl.constexpr, HEAD_MAJOR: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Copy one tile of a window: out [B, T, HEADS * REPEATS, DIM], or with HEAD_MAJOR [B, HEADS * REPEATS, T, DIM]."""
    WIDTH: tl.constexpr = HEADS * DIM
    o_token = first_token + tl.arange(0, ROWS)
    o_column = block * LANES + tl.arange(0, LANES)
    b_x = _load_tile(
        p_x, o_token, o_column, first_token, tokens, x_token, x_column, aligned, START, WIDTH, ROWS, LANES, VECTOR,
        TRANSPOSED,
    )  # fmt: skip
    # Rows of results pass 2^31 elements at sizes in use.
    token = o_token.to(tl.int64)
    first_row = batch * tokens
    if HEAD_MAJOR:
        step = tl.full([], DIM, tl.int64) * tokens
        p_token = out_ptr + first_row * (WIDTH * REPEATS) + (token * DIM)[:, None]
        p_out = p_token + (o_column // DIM * REPEATS * step + o_column % DIM)[None, :]
    else:
        # Every head begins REPEATS heads behind the one before it.
        lane = o_column + o_column // DIM * ((REPEATS - 1) * DIM) if REPEATS > 1 else o_column
        p_out = out_ptr + ((first_row + token) * (WIDTH * REPEATS))[:, None] + lane[None, :]
        step = DIM
    m_out = (o_token < tokens)[:, None]
    if WIDTH % LANES != 0:
        m_out = m_out & (o_column < WIDTH)[None, :]
    for repeat in tl.static_range(REPEATS):
        tl.store(p_out + repeat * step, b_x, mask=m_out)


# Sizes that vary from call to call must not compile the kernel anew.
@triton.jit(do_not_specialize=["x_offset", "token_count", "x_stride_b", "x_stride_t", "x_stride_d"])
def qkv_split_kernel(
    x_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, out4_ptr, out5_ptr,
    x_offset, token_count, x_stride_b, x_stride_t, x_stride_d,
    OFFSET: tl.constexpr, TOKENS: tl.constexpr, X_B: tl.constexpr, X_T: tl.constexpr, X_D: tl.constexpr,
    HEADS0: tl.constexpr, HEADS1: tl.constexpr, HEADS2: tl.constexpr,
    HEADS3: tl.constexpr, HEADS4: tl.constexpr, HEADS5: tl.constexpr,
    DIM0: tl.constexpr, DIM1: tl.constexpr, DIM2: tl.constexpr,
    DIM3: tl.constexpr, DIM4: tl.constexpr, DIM5: tl.constexpr,
    REPEATS0: tl.constexpr, REPEATS1: tl.constexpr, REPEATS2: tl.constexpr,
    REPEATS3: tl.constexpr, REPEATS4: tl.constexpr, REPEATS5: tl.constexpr,
    START: tl.constexpr, HEAD_MAJOR: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, TRANSPOSED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of the columns x tiles of the tokens x batch,), tiles of the columns innermost.

    x [B, T, D] by strides; window i is HEADSi * DIMi columns behind those of windows before it, the first begins at
    START. Windows that are not there have HEADSi = 0 and no pointer. A stride, the offset of x and the number of
    tokens come either compiled in, X_T and so on, or, where that is -1, as a run-time argument. VECTOR elements are
    16 bytes.
    """
    begin(PDL)
    START1: tl.constexpr = START + HEADS0 * DIM0
    START2: tl.constexpr = START1 + HEADS1 * DIM1
    START3: tl.constexpr = START2 + HEADS2 * DIM2
    START4: tl.constexpr = START3 + HEADS3 * DIM3
    START5: tl.constexpr = START4 + HEADS4 * DIM4
    END0: tl.constexpr = (HEADS0 * DIM0 + LANES - 1) // LANES
    END1: tl.constexpr = END0 + (HEADS1 * DIM1 + LANES - 1) // LANES
    END2: tl.constexpr = END1 + (HEADS2 * DIM2 + LANES - 1) // LANES
    END3: tl.constexpr = END2 + (HEADS3 * DIM3 + LANES - 1) // LANES
    END4: tl.constexpr = END3 + (HEADS4 * DIM4 + LANES - 1) // LANES
    END5: tl.constexpr = END4 + (HEADS5 * DIM5 + LANES - 1) // LANES

    tokens = TOKENS if TOKENS >= 0 else token_count
    offset = OFFSET if OFFSET >= 0 else x_offset
    x_batch = X_B if X_B >= 0 else x_stride_b
    x_token = X_T if X_T >= 0 else x_stride_t
    x_column = X_D if X_D >= 0 else x_stride_d
    if TRANSPOSED:
        aligned = (x_column % VECTOR == 0) & (x_batch % VECTOR == 0) & (offset % VECTOR == 0)
    else:
        aligned = (x_token % VECTOR == 0) & (x_batch % VECTOR == 0) & (offset % VECTOR == 0) & (X_D == 1)

    # Neighbouring programs write neighbouring columns of the same tokens.
    tile = tl.program_id(0)
    block = tile % END5
    tiles = tl.cdiv(tokens, ROWS)
    first_token = tile // END5 % tiles * ROWS
    batch = (tile // END5 // tiles).to(tl.int64)
    place = batch * x_batch + offset
    if aligned:
        p_x = x_ptr + place // VECTOR * VECTOR
    else:
        p_x = x_ptr + place

    # One window for all of a program's threads: the branches are uniform.
    if block < END0:
        _copy_tile(p_x, out0_ptr, block, batch, first_token, tokens, x_token, x_column, aligned, START,
                   HEADS0, DIM0, REPEATS0, HEAD_MAJOR, ROWS, LANES, VECTOR, TRANSPOSED)  # fmt: skip
    elif block < END1:
        if HEADS1 > 0:
            _copy_tile(p_x, out1_ptr, block - END0, batch, first_token, tokens, x_token, x_column, aligned, START1,
                       HEADS1, DIM1, REPEATS1, HEAD_MAJOR, ROWS, LANES, VECTOR, TRANSPOSED)  # fmt: skip
    elif block < END2:
        if HEADS2 > 0:
            _copy_tile(p_x, out2_ptr, block - END1, batch, first_token, tokens, x_token, x_column, aligned, START2,
                       HEADS2, DIM2, REPEATS2, HEAD_MAJOR, ROWS, LANES, VECTOR, TRANSPOSED)  # fmt: skip
    elif block < END3:
        if HEADS3 > 0:
            _copy_tile(p_x, out3_ptr, block - END2, batch, first_token, tokens, x_token, x_column, aligned, START3,
                       HEADS3, DIM3, REPEATS3, HEAD_MAJOR, ROWS, LANES, VECTOR, TRANSPOSED)  # fmt: skip
    elif block < END4:
        if HEADS4 > 0:
            _copy_tile(p_x, out4_ptr, block - END3, batch, first_token, tokens, x_token, x_column, aligned, START4,
                       HEADS4, DIM4, REPEATS4, HEAD_MAJOR, ROWS, LANES, VECTOR, TRANSPOSED)  # fmt: skip
    else:
        if HEADS5 > 0:
            _copy_tile(p_x, out5_ptr, block - END4, batch, first_token, tokens, x_token, x_column, aligned, START5,
                       HEADS5, DIM5, REPEATS5, HEAD_MAJOR, ROWS, LANES, VECTOR, TRANSPOSED)  # fmt: skip
