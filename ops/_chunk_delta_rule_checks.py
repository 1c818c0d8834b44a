"""What the arguments of `chunk_delta_rule` must be, with errors that name the argument, what it was and must be."""

from __future__ import annotations

import math
from typing import Any

import torch

from fusion_passes.ops._checks import FLOATS, check_shape, known_different

Tensor = torch.Tensor

GATES = ("log", "softplus", "bounded")


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, a_log: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, norm_eps: float | None, gate: str,
    lower_bound: float, beta_sigmoid: float | None, out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Check everything but the values of tensors.

    Raises:
        TypeError: a tensor or `out_dtype` has the wrong dtype.
        ValueError: a shape, stride, device or number is wrong.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "a_log": a_log, "dt_bias": dt_bias,
               "initial_state": initial_state}  # fmt: skip
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATS:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {t.dtype}")
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype must be bfloat16, float16 or float32, got {out_dtype}")
    for name, t in {**tensors, "cu_seqlens": cu_seqlens}.items():
        if t is not None and t.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}), got {t.device}")
    _check_token_tensors(q, k, v, g, beta)
    _check_gate(g, v, k, a_log, dt_bias, gate, lower_bound)
    _check_sequences(q, k, v, initial_state, cu_seqlens)
    for name, value in (("scale", scale), ("norm_eps", norm_eps), ("beta_sigmoid", beta_sigmoid)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if norm_eps is not None and norm_eps < 0:
        raise ValueError(f"norm_eps must not be negative, got {norm_eps}; None leaves q and k as they are")


def _check_token_tensors(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must be [B, T, HK, K], got shape {list(q.shape)}")
    check_shape("k", k, q.shape, "[B, T, HK, K] as q")
    if v.dim() != 4:
        raise ValueError(f"v must be [B, T, HV, V], got shape {list(v.shape)}")
    batch, tokens, heads, channels = q.shape
    value_heads = v.shape[2]
    check_shape("v", v, (batch, tokens, value_heads, v.shape[3]), "[B, T, HV, V] with B and T of q")
    if isinstance(heads, int) and isinstance(value_heads, int) and (heads == 0 or value_heads % heads):
        raise ValueError(f"v must have a multiple of the {heads} heads of q and k, got {value_heads}")
    if g.dim() == 4:
        check_shape("g", g, (batch, tokens, value_heads, channels), "[B, T, HV] or [B, T, HV, K]")
    else:
        check_shape("g", g, (batch, tokens, value_heads), "[B, T, HV] or [B, T, HV, K]")
    check_shape("beta", beta, (batch, tokens, value_heads), "[B, T, HV]")
    for name, t in (("q", q), ("k", k), ("v", v), *((("g", g),) if g.dim() == 4 else ())):
        if known_different(t.stride(-1), 1) and known_different(t.shape[-1], 1):
            raise ValueError(f"{name} must have stride 1 along its last axis, got strides {list(t.stride())}")


def _check_gate(
    g: Tensor, v: Tensor, k: Tensor, a_log: Tensor | None, dt_bias: Tensor | None, gate: str, lower_bound: float
) -> None:
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(map(repr, GATES))}, got {gate!r}")
    if gate == "log":
        for name, t in (("a_log", a_log), ("dt_bias", dt_bias)):
            if t is not None:
                raise ValueError(f"{name} must be None with gate='log', where g is the log decay, got {list(t.shape)}")
    elif a_log is None:
        raise ValueError(f"a_log must be a tensor with gate={gate!r}, got None")
    if gate == "bounded" and not (math.isfinite(lower_bound) and lower_bound <= 0):
        raise ValueError(f"lower_bound must be finite and not above 0, got {lower_bound}")
    heads, channels = v.shape[2], k.shape[3]
    for name, t in (("a_log", a_log), ("dt_bias", dt_bias)):
        if t is None:
            continue
        if t.dim() == 2 and g.dim() == 4:
            check_shape(name, t, (heads, channels), "[HV] or [HV, K]")
        else:
            check_shape(name, t, (heads,), "[HV] or [HV, K]" if g.dim() == 4 else "[HV], as g has no channels")


def _check_sequences(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    sequences: Any = q.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or (isinstance(cu_seqlens.shape[0], int) and cu_seqlens.shape[0] < 1):
            shape = list(cu_seqlens.shape)
            raise ValueError(f"cu_seqlens must be [S + 1], the bounds of S sequences, got shape {shape}")
        if not cu_seqlens.is_contiguous():
            raise ValueError(f"cu_seqlens must be contiguous, got strides {list(cu_seqlens.stride())}")
        if known_different(q.shape[0], 1):
            raise ValueError(f"q must have B = 1 with cu_seqlens (sequences are packed along T), got B = {q.shape[0]}")
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        wanted = "[B, HV, K, V]" if cu_seqlens is None else "[S, HV, K, V] for S sequences"
        check_shape("initial_state", initial_state, (sequences, v.shape[2], k.shape[3], v.shape[3]), wanted)
        if not initial_state.is_contiguous():
            raise ValueError(f"initial_state must be contiguous, got strides {list(initial_state.stride())}")


def check_bounds(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The bounds of packed sequences, checked, for a tensor on the host.

    Raises:
        ValueError: the bounds do not go from 0 to T in order.
    """
    bounds = [int(bound) for bound in cu_seqlens.tolist()]
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens must start at 0 and end at T = {tokens}, got {bounds[0]} and {bounds[-1]}")
    for index, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if end < start:
            raise ValueError(f"cu_seqlens must not decrease, got {start}, {end} at positions {index} and {index + 1}")
    return bounds
