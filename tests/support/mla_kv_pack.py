"""Shared by the tests of `mla_kv_pack`: its arguments, an independent result, and a launch on any device."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fusion_passes.ops.mla_kv_pack import key_plan, plan
from tests.support.programs import run

Tensor = torch.Tensor

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2

# Scales to divide by, those among them whose reciprocal is no normal number.
DIVISORS = (3.0, 0.1, -7.3, 448.0, 1e-3, 1e-30, 1e30, 3e38, 1e-40, 0.0, math.inf, math.nan)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the op by name; `v` is None for the key alone."""

    k_nope: Tensor
    k_pe: Tensor
    v: Tensor | None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_steps: str = ""
    k_dtype: torch.dtype = E4
    k_layout: str = "bthd"
    pe_first: bool = False
    v_steps: str = ""
    v_dtype: torch.dtype = E4
    v_layout: str = "bthd"

    def positional(self) -> tuple[Any, ...]:
        """As the op takes them: `mla_kv_pack` with a value, else `mla_k_pack`."""
        form = (self.k_steps, self.k_dtype, self.k_layout, self.pe_first)
        if self.v is None:
            return (self.k_nope, self.k_pe, self.k_scale, *form)
        value = (self.v_steps, self.v_dtype, self.v_layout)
        return (self.k_nope, self.k_pe, self.v, self.k_scale, self.v_scale, *form, *value)


def draw(
    batch: int = 1, tokens: int = 5, heads: int = 4, nope: int = 128, pe: int = 64, value: int = 128, *,
    dtype: torch.dtype = torch.bfloat16, device: str = "cpu", amplitude: float = 30.0, special: bool = True,
    seed: int = 0, **form: Any,
) -> Arguments:  # fmt: skip
    """Windows of one projection, if `special` with infinities, NaN and values beyond the range of float8 among them."""
    generator = torch.Generator(device).manual_seed(seed)
    kv = torch.randn(batch, tokens, heads, nope + value, generator=generator, device=device) * amplitude
    k_pe = torch.randn(batch, tokens, pe, generator=generator, device=device) * amplitude
    values = torch.tensor([0.0, -0.0, 448.0, 464.0, -470.0, 1e6, 57344.0, -7e4, float("inf"), float("nan")])
    for t in (kv, k_pe) if special else ():
        flat = t.view(-1)
        places = torch.randint(flat.numel(), (min(40, flat.numel()),), generator=generator, device=device)
        flat[places] = values.to(device).repeat(4)[: len(places)]
    kv, k_pe = kv.to(dtype), k_pe.to(dtype)
    return Arguments(kv[..., :nope], k_pe, kv[..., nope:] if value else None, **form)


def expected(args: Arguments) -> list[Tensor]:
    """The results from the formula: float32 steps on the CPU, then a cast that saturates."""
    key = torch.cat([args.k_nope.cpu(), args.k_pe.cpu()[:, :, None].expand(*args.k_nope.shape[:3], -1)], -1)
    if args.pe_first:
        width = args.k_nope.shape[-1]
        key = torch.cat([key[..., width:], key[..., :width]], -1)
    found = [_finished(key, args.k_steps, args.k_scale, args.k_dtype, args.k_layout)]
    if args.v is not None:
        found.append(_finished(args.v.cpu(), args.v_steps, args.v_scale, args.v_dtype, args.v_layout))
    return found


def _finished(value: Tensor, steps: str, scale: Tensor | None, dtype: torch.dtype, layout: str) -> Tensor:
    wide = value.float()
    number = None if scale is None else scale.cpu().float().reshape(())
    for step in steps.split():
        if step.startswith("clamp("):
            low, high = map(float, step[6:-1].split(","))
            wide = wide.clamp(low, high)
        elif "s" not in step:
            wide = wide * float(step[1:])
        else:
            assert number is not None
            wide = {"*s": wide * number, "/s": wide / number, "*1/s": wide * (1.0 / number)}[step]
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        wide = torch.where(wide.isnan(), wide, wide.clamp(-largest, largest))
    cast = wide.to(dtype)
    return cast.transpose(1, 2).contiguous() if layout == "bhtd" else cast


def same_bytes(actual: Tensor, wanted: Tensor) -> bool:
    """Equal bit for bit, but for the bits of NaN."""
    actual, wanted = actual.cpu(), wanted.cpu()
    if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[wanted.dtype.itemsize]
    both_nan = actual.float().isnan() & wanted.float().isnan()
    return bool(((actual.view(integer) == wanted.view(integer)) | both_nan).all())


def launch(args: Arguments, arch: str = "sm_90", inlined: bool = False) -> list[Tensor]:
    """Run the kernel, with outputs of NaN that it has to overwrite."""
    return list(run(plan if args.v is not None else key_plan, args.positional(), arch, inlined))
