"""The part of a chunked delta rule that needs no state: Gated DeltaNet (arXiv:2412.06464), Kimi delta attention
(arXiv:2510.26692).

Within every chunk of C tokens, with G the sums of the log decays up to and including a token,

    L_ij = beta_i sum_k k_i k_j exp(G_i - G_j)              for j < i
    u = (I + L)^-1 (beta v),  w = (I + L)^-1 (beta k exp G)
    P_ij = scale sum_k q_i k_j exp(G_i - G_j)               for j <= i, else 0

so that a scan over chunks with states S [K, V] is v' = u - w S, o = scale (q exp G) S + P v' (section 3.3 of the first
paper). G is one number per head (Gated DeltaNet) or per channel of the key (Kimi). Value head h reads the key and query
of head h // (HV / HK). k and q are l2-normalised first where `norm_eps` is given, x / sqrt(sum x^2 + norm_eps).

Only differences of G are exponentiated: strong decays are exact, and nothing overflows. Sums of -inf count as -1e30:
what comes later decays to nothing against what was before, and not at all between two tokens of that kind.

Dims: B batch, T tokens, HK key heads, HV value heads, K key dim, V value dim, N chunks, C tokens per chunk.
"""

from __future__ import annotations

from typing import Any

import torch

from fusion_passes.lowering import Operand, Target, define
from fusion_passes.ops._checks import typed
from fusion_passes.ops._delta_rule_intra_checks import check_arguments

Tensor = torch.Tensor

SCHEMA = (
    "(Tensor k, Tensor v, Tensor sums, Tensor beta, Tensor? q, float scale, float? norm_eps, str results, "
    "bool columns, bool chunks_first, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)"
)
LOWEST = -1e30


# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    k: Tensor, v: Tensor, sums: Tensor, beta: Tensor, q: Tensor | None, scale: float, norm_eps: float | None,
    results: str, columns: bool, chunks_first: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op in plain PyTorch, in float64 if any operand is, else in float32; arguments as in `SCHEMA`."""
    operands = [t for t in (k, v, sums, beta, q) if t is not None]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
    chunks, length = sums.shape[2:4]
    heads = v.shape[2]

    def chunked(t: Tensor, normalised: bool = False) -> Tensor:
        """[B, HV, N, C, D] of [B, T, h, D], zero behind the last token."""
        t = t.to(wide)
        if normalised and norm_eps is not None:
            t = t * torch.rsqrt(t.square().sum(-1, keepdim=True) + norm_eps)
        t = t.repeat_interleave(heads // t.shape[2], dim=2).transpose(1, 2)
        t = torch.nn.functional.pad(t, (0, 0, 0, chunks * length - t.shape[2]))
        return t.unflatten(2, (chunks, length))

    keys, values, strength = chunked(k, True), chunked(v), chunked(beta.unsqueeze(-1))
    queries = None if q is None else chunked(q, True) * scale
    decays = (sums if sums.dim() == 5 else sums.unsqueeze(-1)).to(wide).clamp_min(LOWEST)
    found = [
        _chunk(keys[:, :, n], values[:, :, n], decays[:, :, n], strength[:, :, n],
               None if queries is None else queries[:, :, n])
        for n in range(chunks)
    ]  # fmt: skip
    dtype = torch.double if wide == torch.float64 else out_dtype
    if not found:
        shapes = _shapes(k, v, sums, q, results)
        u, w, pairs = (k.new_empty(shape, dtype=dtype) for shape in shapes)
        return _laid_out(u, columns), _laid_out(w, columns), _by_chunk(pairs, chunks_first)
    u, w, pairs = (torch.stack(parts, 2).to(dtype) for parts in zip(*found))
    if results != "u,w":
        u, w = torch.cat([u, w] if results == "uw" else [w, u], -1), w.new_empty(0)
    if q is None:
        pairs = pairs.new_empty(0)
    return _laid_out(u, columns), _laid_out(w, columns), _by_chunk(pairs, chunks_first)


def _chunk(k: Tensor, v: Tensor, sums: Tensor, beta: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """u, w and pairs (zeros without q) of one chunk; sums [B, H, C, K or 1], beta [B, H, C, 1]."""
    causal = torch.ones(sums.shape[2], sums.shape[2], dtype=torch.bool, device=k.device).tril().unsqueeze(-1)
    # in float64: after a strong decay the differences of weak ones are small against their sums
    difference = sums.double().unsqueeze(3) - sums.double().unsqueeze(2)
    between = difference.masked_fill(~causal, -torch.inf).exp().to(k.dtype)  # [B, H, C, C, K or 1]
    if sums.shape[-1] == 1:
        kk, qk = ((x @ k.mT) * between.squeeze(-1) for x in (k, k if q is None else q))
    else:
        decayed = k.unsqueeze(2) * between
        kk, qk = ((x.unsqueeze(3) * decayed).sum(-1) for x in (k, k if q is None else q))
    right = torch.cat([beta * v, beta * k * sums.double().exp().to(k.dtype)], -1)
    # unitriangular: the ones on the diagonal are implied
    solved = torch.linalg.solve_triangular((beta * kk).tril(-1), right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    return u, w, qk


def _laid_out(t: Tensor, columns: bool) -> Tensor:
    """A tensor [.., C, D] of its own, by columns within a chunk where asked for."""
    return t.mT.contiguous().mT if columns and t.dim() > 1 else t.contiguous()


def _by_chunk(pairs: Tensor, chunks_first: bool) -> Tensor:
    """A tensor [B, HV, N, C, C] of its own, in memory [N, B, HV, C, C] where asked for."""
    return pairs.movedim(2, 0).contiguous().movedim(0, 2) if chunks_first and pairs.dim() > 1 else pairs.contiguous()


# --- op --------------------------------------------------------------------------------------------------------------


def _shapes(k: Tensor, v: Tensor, sums: Tensor, q: Tensor | None, results: str) -> tuple[tuple[Any, ...], ...]:
    """Shapes of u, w and the pairs."""
    chunked = tuple(sums.shape[:4])
    value, key = v.shape[3], k.shape[3]
    first, second = ((*chunked, value), (*chunked, key)) if results == "u,w" else ((*chunked, value + key), (0,))
    return first, second, (*chunked, chunked[3]) if q is not None else (0,)


def _fake(
    k: Tensor, v: Tensor, sums: Tensor, beta: Tensor, q: Tensor | None, scale: float, norm_eps: float | None,
    results: str, columns: bool, chunks_first: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_arguments(k, v, sums, beta, q, scale, norm_eps, results, out_dtype)
    u, w, pairs = (k.new_empty(shape, dtype=out_dtype) for shape in _shapes(k, v, sums, q, results))
    if columns:
        u, w = (
            t if t.dim() == 1 else k.new_empty((*t.shape[:3], t.shape[4], t.shape[3]), dtype=out_dtype).mT
            for t in (u, w)
        )
    if chunks_first and q is not None:
        order = [sums.shape[2], *sums.shape[:2], sums.shape[3], sums.shape[3]]
        pairs = k.new_empty(order, dtype=out_dtype).movedim(0, 2)
    return u, w, pairs


def _cpu(
    k: Tensor, v: Tensor, sums: Tensor, beta: Tensor, q: Tensor | None, scale: float, norm_eps: float | None,
    results: str, columns: bool, chunks_first: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_arguments(k, v, sums, beta, q, scale, norm_eps, results, out_dtype)
    return reference(k, v, sums, beta, q, scale, norm_eps, results, columns, chunks_first, out_dtype)


def _plan(target: Target, k: Operand, v: Operand, *rest: Any) -> Any:
    """The launch, imported when it is needed: importing the op alone must not import Triton."""
    from fusion_passes.ops._delta_rule_intra_plan import plan

    return plan(target, k, v, *rest)


OP = define(
    "delta_rule_intra",
    SCHEMA,
    reference=_cpu,
    fake=_fake,
    plan=_plan,
    backward="delta_rule_intra has no gradient: it is for inference. Call it under torch.no_grad().",
    keep_stride_order=True,
)


@typed
def delta_rule_intra(
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    beta: Tensor,
    q: Tensor | None = None,
    *,
    scale: float | None = None,
    norm_eps: float | None = None,
    results: str = "u,w",
    columns: bool = False,
    chunks_first: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """u, w and the pairs of q and k of every chunk: the formulas at the top of this module.

    Args:
        k: [B, T, HK, K]; bfloat16, float16 or float32, as v, beta and q; any strides whose last is 1. K and V are
            multiples of 16, up to 256.
        v: [B, T, HV, V], HV a multiple of HK; any strides whose last is 1.
        sums: G, [B, HV, N, C], or [B, HV, N, C, K] with one decay per channel; float32; C 16, 32 or 64, and N C at
            least T: rows behind the last token are zero. Any strides, the last 1 with channels.
        beta: [B, T, HV], any strides.
        q: [B, T, HK, K], or None if the pairs are not wanted.
        scale: factor of q, K ** -0.5 unless given.
        norm_eps: l2-normalise k and q, with this under the root.
        results: "u,w", or "uw" or "wu" for one tensor [B, HV, N, C, V + K] with both side by side.
        columns: the rows of u and w, rather than their channels, lie next to one another in memory, as a triangular
            solve leaves them.
        chunks_first: the pairs of one chunk, of all batches and heads, lie next to one another in memory.
        out_dtype: dtype of the results, float32 unless given.

    Returns:
        u [B, HV, N, C, V] and w [B, HV, N, C, K], or both in the first and None; the pairs [B, HV, N, C, C] or None.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, stride, device or value; the message says what it
            is and what it must be.
        NotImplementedError: a backward pass reaches the op.
    """
    u, w, pairs = OP(
        k, v, sums, beta, q, k.shape[-1] ** -0.5 if scale is None else scale, norm_eps, results, columns,
        chunks_first, torch.float32 if out_dtype is None else out_dtype,
    )  # fmt: skip
    return u, w if results == "u,w" else None, pairs if q is not None else None


def cases() -> list[Any]:
    """The benchmarked shapes; see `_delta_rule_intra_cases`."""
    from fusion_passes.ops import _delta_rule_intra_cases

    return _delta_rule_intra_cases.cases()
