"""The delta rule with a gate: Gated DeltaNet (arXiv:2412.06464) and Kimi delta attention (arXiv:2510.26692).

With a state S [K, V] per value head, for the tokens t of a sequence in order

    S <- diag(exp g_t) S
    S <- S + beta_t k_t (v_t - S^T k_t)^T
    o_t = scale S^T q_t

g is one log decay per head (Gated DeltaNet) or per channel of the key (Kimi). Value head h reads the query and key of
head h // (HV / HK). q and k are l2-normalised first where `norm_eps` is given, x / sqrt(sum x^2 + norm_eps). The gate
and the sigmoid of beta may be computed by the op:

    gate "log"       g is the log decay, at most 0 as a rule; -inf empties the state
    gate "softplus"  -exp(a_log) * softplus(g + dt_bias)
    gate "bounded"   lower_bound * sigmoid(exp(a_log) * (g + dt_bias))
    beta_sigmoid c   c * sigmoid(beta)

The reference works on chunks of `CHUNK` tokens (section 3 of arXiv:2412.06464): with G the sum of g within the chunk
and D_ij = exp(G_i - G_j),

    (I + L) v' = beta (v - (k exp G) S),  L_ij = beta_i sum_k k_i k_j D_ij for j < i
    o_i = scale ((q_i exp G_i) S + sum over j <= i of (sum_k q_i k_j D_ij) v'_j)
    S <- diag(exp G_last) S + sum_j (k_j D_last,j) v'_j^T

Only differences of G are exponentiated, so that strong decays neither overflow nor lose the digits of weak ones. The
result does not depend on the chunk size but for rounding.

Dims: B batch, T tokens, HK key heads, HV value heads, K key dim, V value dim, S sequences packed along T.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fusion_passes.lowering import define
from fusion_passes.ops._checks import typed
from fusion_passes.ops._chunk_delta_rule_checks import check_arguments, check_bounds
from fusion_passes.ops.gate_cumsum import gate_reference

Tensor = torch.Tensor

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? a_log, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, float scale, float? norm_eps, str gate, float lower_bound, float? beta_sigmoid, "
    "ScalarType out_dtype, bool output_final_state) -> (Tensor, Tensor)"
)

# Tokens per chunk of the reference: pairs of tokens are formed for every channel, so a small one is quick.
CHUNK = 16


# --- reference -------------------------------------------------------------------------------------------------------


def log_decay(g: Tensor, a_log: Tensor | None, dt_bias: Tensor | None, gate: str, lower_bound: float) -> Tensor:
    """The log decay [B, T, HV] or [B, T, HV, K] of any of the gates."""
    if a_log is None:
        return g
    # [HV] against [HV, K]
    rate, bias = (t[:, None] if t is not None and t.dim() < g.dim() - 2 else t for t in (a_log, dt_bias))
    assert rate is not None
    return gate_reference(g, rate, bias, lower_bound if gate == "bounded" else None, beta=1.0, threshold=20.0)


def reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, a_log: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, norm_eps: float | None, gate: str,
    lower_bound: float, beta_sigmoid: float | None, out_dtype: torch.dtype, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op in plain PyTorch, in float64 if any operand is, else in float32; arguments as in `SCHEMA`."""
    operands = [t for t in (q, k, v, g, beta, a_log, dt_bias, initial_state) if t is not None]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
    q, k, v, g, beta = (t.to(wide) for t in (q, k, v, g, beta))
    a_log, dt_bias = (t if t is None else t.to(wide) for t in (a_log, dt_bias))
    g = log_decay(g, a_log, dt_bias, gate, lower_bound)
    if beta_sigmoid is not None:
        beta = beta_sigmoid * torch.sigmoid(beta)
    if norm_eps is not None:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + norm_eps) for x in (q, k))
    repeats = v.shape[2] // k.shape[2]
    q, k = ((x * factor).repeat_interleave(repeats, dim=2) for x, factor in ((q, scale), (k, 1.0)))
    q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g if g.dim() == 4 else g.unsqueeze(-1)))  # [B, HV, T, ...]
    beta = beta.transpose(1, 2).unsqueeze(-1)
    bounds = [0, q.shape[2]] if cu_seqlens is None else [int(bound) for bound in cu_seqlens.tolist()]
    outputs, states = [], []
    for index, (start, end) in enumerate(zip(bounds, bounds[1:])):
        state = v.new_zeros(v.shape[0], v.shape[1], k.shape[-1], v.shape[-1])
        if initial_state is not None:
            state = initial_state.to(wide) if cu_seqlens is None else initial_state[index : index + 1].to(wide)
        for first in range(start, end, CHUNK):
            here = slice(first, min(first + CHUNK, end))
            out, state = _chunk(q[:, :, here], k[:, :, here], v[:, :, here], g[:, :, here], beta[:, :, here], state)
            outputs.append(out)
        states.append(state)
    o = torch.cat(outputs, dim=2) if outputs else torch.zeros_like(v)
    result = torch.double if wide == torch.float64 else out_dtype
    final = v.new_zeros(0, v.shape[1], k.shape[-1], v.shape[-1])
    final = torch.cat([final, *states]) if output_final_state else final.new_empty(0)
    return o.transpose(1, 2).to(result).contiguous(), final


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, C, V] and the next state of one chunk; g [B, H, C, K or 1], beta [B, H, C, 1]."""
    emptied = g == -math.inf
    # in float64: after a strong decay the differences of weak ones are small against their sums
    sums = g.masked_fill(emptied, 0.0).double().cumsum(2)
    resets = emptied.cumsum(2)
    length = q.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().unsqueeze(-1)
    seen = causal & (resets.unsqueeze(3) == resets.unsqueeze(2))
    difference = sums.unsqueeze(3) - sums.unsqueeze(2)
    between = difference.masked_fill(~seen, -math.inf).exp().to(q.dtype)  # [B, H, C, C, K or 1]
    since_start = sums.masked_fill(resets > 0, -math.inf).exp().to(q.dtype)
    pairs = k.unsqueeze(2) * between
    lower = (beta.unsqueeze(3) * k.unsqueeze(3) * pairs).sum(-1).tril(-1)
    right = beta * (v - (k * since_start) @ state)
    # unitriangular: the ones on the diagonal are implied
    written = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    out = (q * since_start) @ state + (q.unsqueeze(3) * pairs).sum(-1) @ written
    state = state * since_start[:, :, -1].unsqueeze(-1) + pairs[:, :, -1].mT @ written
    return out, state


# --- op --------------------------------------------------------------------------------------------------------------


def _fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, a_log: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, norm_eps: float | None, gate: str,
    lower_bound: float, beta_sigmoid: float | None, out_dtype: torch.dtype, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_arguments(q, k, v, g, beta, a_log, dt_bias, initial_state, cu_seqlens, scale, norm_eps, gate, lower_bound,
                    beta_sigmoid, out_dtype)  # fmt: skip
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, v.shape[2], k.shape[3], v.shape[3]) if output_final_state else (0,)
    return v.new_empty(v.shape, dtype=out_dtype), v.new_empty(shape, dtype=torch.float32)


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, a_log: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, norm_eps: float | None, gate: str,
    lower_bound: float, beta_sigmoid: float | None, out_dtype: torch.dtype, output_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    args = (q, k, v, g, beta, a_log, dt_bias, initial_state, cu_seqlens, scale, norm_eps, gate, lower_bound,
            beta_sigmoid, out_dtype, output_final_state)  # fmt: skip
    _fake(*args)
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, q.shape[1])
    return reference(*args)


def _plan(*args: Any) -> Any:
    """The launches, imported when they are needed: importing the op alone must not import Triton."""
    from fusion_passes.ops._chunk_delta_rule_plan import plan

    return plan(*args)


OP = define(
    "chunk_delta_rule",
    SCHEMA,
    reference=_cpu,
    fake=_fake,
    plan=_plan,
    backward="chunk_delta_rule has no gradient: it is for inference. Call it under torch.no_grad().",
    keep_stride_order=True,
)


@typed
def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    a_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    norm_eps: float | None = None,
    gate: str = "log",
    lower_bound: float = -5.0,
    beta_sigmoid: float | None = None,
    out_dtype: torch.dtype | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule over every sequence of a batch: the formulas at the top of this module.

    Args:
        q, k: [B, T, HK, K]; bfloat16, float16 or float32, as all tensors here; any strides whose last is 1.
        v: [B, T, HV, V], HV a multiple of HK; any strides whose last is 1.
        g: [B, T, HV], or [B, T, HV, K] for one decay per channel; the log decay or the argument of the gate.
        beta: [B, T, HV], any strides.
        a_log: [HV] or [HV, K], with the gates that the op computes.
        dt_bias: likewise, or None for no bias.
        scale: factor of q, K ** -0.5 unless given.
        initial_state: [B, HV, K, V], contiguous; zeros unless given.
        cu_seqlens: [S + 1] int32 or int64: sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1] of tensors with
            B = 1, and states are [S, HV, K, V]. On a GPU nothing is read back to the host.
        norm_eps: l2-normalise q and k, with this under the root.
        gate: "log", "softplus" or "bounded".
        lower_bound: of the bounded gate.
        beta_sigmoid: beta is this times the sigmoid of the given values.
        out_dtype: dtype of the outputs, that of v unless given.
        output_final_state: return the state after the last token.

    Returns:
        o [B, T, HV, V], contiguous, and the final state, float32 [B or S, HV, K, V], or None unless asked for.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, stride, device or value; the message says what it
            is and what it must be.
        NotImplementedError: a backward pass reaches the op.
    """
    o, state = OP(
        q, k, v, g, beta, a_log, dt_bias, initial_state, cu_seqlens, q.shape[-1] ** -0.5 if scale is None else scale,
        norm_eps, gate, lower_bound, beta_sigmoid, v.dtype if out_dtype is None else out_dtype, output_final_state,
    )  # fmt: skip
    return o, state if output_final_state else None


def cases() -> list[Any]:
    """The benchmarked shapes; see `_chunk_delta_rule_cases`."""
    from fusion_passes.ops import _chunk_delta_rule_cases

    return _chunk_delta_rule_cases.cases()
