"""Shared by the tests of `index_score`: its arguments, an independent result, and a launch on any device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fusion_passes.ops.index_score import plan
from tests.support.programs import run

Tensor = torch.Tensor

E4 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the op by name."""

    q: Tensor
    k: Tensor
    w: Tensor
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    mask: Tensor | None = None
    mask_kind: str = "none"
    causal_offset: int = 0
    scale: float = 0.3
    fill: float = -math.inf
    keep_nan: bool = True
    scale_after: bool = False
    precision: str = "tf32x3"
    dtype: torch.dtype = torch.float32
    layout: str = "bst"

    def positional(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def draw(
    batch: int = 1, queries: int = 5, keys: int = 40, heads: int = 8, width: int = 16, *,
    dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0, scales: str = "", w_dtype: Any = None,
    **form: Any,
) -> Arguments:  # fmt: skip
    """Normal q and k, weights of either sign, and the scales named by `scales` ("q", "k", "qk"), of either sign."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k = normal(batch, queries, heads, width).to(dtype), normal(batch, keys, width)
    w = normal(batch, queries, heads).to(w_dtype or torch.float32)
    found = {"q": (batch, queries, heads), "k": (batch, keys)}
    form |= {f"{name}_scale": normal(*found[name]) for name in scales}
    out = form.pop("out", torch.float32)
    return Arguments(q, k.to(dtype), w, dtype=out, **form)


def hidden(kind: str, batch: int, queries: int, keys: int, *, seed: int = 1, device: str = "cpu") -> dict[str, Any]:
    """The mask arguments of a kind: ragged rows, some that see nothing, and whole blocks that nobody sees."""
    if kind == "none":
        return {}
    if kind == "causal":
        return {"mask_kind": kind, "causal_offset": keys - queries}
    generator = torch.Generator(device).manual_seed(seed)
    seen = torch.rand(batch, queries, keys, generator=generator, device=device) < 0.7
    seen &= torch.arange(keys, device=device) < torch.arange(queries, device=device)[:, None] * keys / queries
    if kind == "add":
        noise = torch.rand(seen.shape, generator=generator, device=device)
        lowest = torch.where(noise < 0.5, -math.inf, torch.finfo(torch.float32).min)
        return {"mask_kind": kind, "mask": torch.where(seen, noise, lowest)}
    return {"mask_kind": kind, "mask": seen if kind == "keep" else ~seen}


def expected(args: Arguments) -> Tensor:
    """The scores [B, S, T] in float64, head by head from the formula."""
    q, k, w = args.q.double(), args.k.double(), args.w.double()
    scores = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=torch.float64, device=q.device)
    for head in range(q.shape[2]):
        product = q[:, :, head] @ k.mT
        if args.q_scale is not None:
            product = product * args.q_scale[:, :, head, None].double()
        if args.k_scale is not None and not args.scale_after:
            product = product * args.k_scale[:, None, :].double()
        relu = product.clamp_min(0) if args.keep_nan else torch.where(product > 0, product, 0.0)
        scores += w[:, :, head, None] * relu
    scores *= args.scale
    if args.k_scale is not None and args.scale_after:
        scores *= args.k_scale[:, None, :].double()
    if args.mask_kind == "add":
        assert args.mask is not None
        return scores + args.mask.double()
    if args.mask_kind == "causal":
        s, t = (torch.arange(n, device=q.device) for n in scores.shape[1:])
        return torch.where(t > s[:, None] + args.causal_offset, args.fill, scores)
    if args.mask is not None:
        return torch.where(args.mask == (args.mask_kind == "keep"), scores, args.fill)
    return scores


def expected_in_chunks(args: Arguments, rows: int = 256) -> Tensor:
    """`expected`, some queries at a time: for sizes at which all products would not fit."""
    found = []
    for start in range(0, args.q.shape[1], rows):
        part = slice(start, start + rows)
        per_query = {name: getattr(args, name) for name in ("q", "w", "q_scale", "mask")}
        cut: dict[str, Any] = {name: t if t is None else t[:, part] for name, t in per_query.items()}
        found.append(expected(dataclasses.replace(args, **cut, causal_offset=args.causal_offset + start)))
    return torch.cat(found, 1)


def in_batch_order(out: Tensor, layout: str) -> Tensor:
    """The op's result as [B, S, T]."""
    return out.permute([layout.index(axis) for axis in "bst"])


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """L2 error relative to the exact values, over finite places; infinite where NaN, inf or hidden places differ."""
    actual, exact = actual.double(), exact.double()
    plain = exact.isfinite() & (exact > -1e37)
    other = ~plain
    same = (actual == exact) | (actual.isnan() & exact.isnan()) | ((actual - exact).abs() <= 1e-6 * exact.abs())
    if not bool(same[other].all()) or not bool(actual[plain].isfinite().all()):
        return math.inf
    return float((actual - exact)[plain].norm() / exact[plain].norm().clamp_min(1e-30))


def launch(args: Arguments, arch: str = "sm_90", inlined: bool = False) -> Tensor:
    """Run the kernel on an output of NaN that it has to overwrite; [B, S, T]."""
    (out,) = run(plan, args.positional(), arch, inlined)
    return in_batch_order(out, args.layout)
