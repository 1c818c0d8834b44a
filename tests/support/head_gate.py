"""Shared by the tests of `head_gate`: its arguments, a float64 result, and a launch on any device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fusion_passes import tuning
from fusion_passes.ops.head_gate import plan
from tests.support.programs import run

Tensor = torch.Tensor
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# Dtypes of x, weight and product, one row for every form of the kernel's product.
FORMS = {
    "rounded": (BF16, BF16, BF16),
    "rounded_half": (F16, F16, F16),
    "exact": (BF16, BF16, F32),
    "exact_half": (F16, F16, F32),
    "split_weight": (BF16, F32, F32),
    "split_x": (F32, BF16, F32),
    "float32": (F32, F32, F32),
    "mixed": (F16, F32, F32),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the op by name."""

    x: Tensor
    weight: Tensor
    q_scale: Tensor | None = None
    scale: float = 0.37
    product_dtype: torch.dtype = F32
    dtype: torch.dtype = F32
    head_first: bool = False

    def positional(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def draw(
    batch: int = 1, tokens: int = 5, heads: int = 24, columns: int = 200, *, form: str = "rounded",
    with_scale: bool = True, device: str = "cpu", seed: int = 0, **rest: Any,
) -> Arguments:  # fmt: skip
    """Normal rows, weights that keep their variance, positive scales."""
    generator = torch.Generator(device).manual_seed(seed)
    x_dtype, w_dtype, product = FORMS[form]
    x = torch.randn(batch, tokens, columns, generator=generator, device=device).to(x_dtype)
    weight = (torch.randn(heads, columns, generator=generator, device=device) * columns**-0.5).to(w_dtype)
    q_scale = torch.rand(batch, tokens, heads, generator=generator, device=device) if with_scale else None
    return Arguments(x, weight, q_scale, product_dtype=product, **rest)


def expected(args: Arguments) -> Tensor:
    """The formula in float64, the product rounded where the op rounds it."""
    product = torch.einsum("btk,hk->bth", args.x.double(), args.weight.double())
    if args.product_dtype != F32:
        product = product.to(args.product_dtype).double()
    out = product * args.scale * (1.0 if args.q_scale is None else args.q_scale.double())
    return out.transpose(1, 2) if args.head_first else out


def error(actual: Tensor, args: Arguments) -> float:
    """Relative L2 error against `expected`."""
    wanted = expected(args)
    assert actual.shape == wanted.shape and actual.dtype == args.dtype and actual.is_contiguous()
    return float((actual.double() - wanted).norm() / wanted.norm())


def bound(args: Arguments) -> float:
    """What the op promises: float32 sums, some that end on the other side of a rounding, and that of the result."""
    rounds_to_other_side = 3e-4 if args.product_dtype != F32 else 0.0
    return 6e-7 + rounds_to_other_side + (torch.finfo(args.dtype).eps / 2 if args.dtype != F32 else 0.0)


def launch(args: Arguments, forced: str = "", arch: str = "sm_90", inlined: bool = False) -> Tensor:
    """Run the kernel, with memory of NaN that it has to overwrite."""
    with tuning.overriding(**({"head_gate": forced} if forced else {})):
        return run(plan, args.positional(), arch, inlined)[0]


def check(args: Arguments, forced: str = "", inlined: bool = False) -> None:
    found = error(launch(args, forced, inlined=inlined), args)
    assert found <= bound(args), found


def special_values(args: Arguments) -> Arguments:
    """Infinities and NaN in some rows of x and of the weights; the last rows stay free of them."""
    x, weight = args.x.clone(), args.weight.clone()
    x[0, 0, 3], x[0, 1, 5], x[0, 2, 7] = torch.inf, -torch.inf, torch.nan
    weight[0, 11], weight[1, 13], weight[2, 17] = torch.inf, -torch.inf, torch.nan
    weight[3, 3] = 0.0  # 0 * inf
    return dataclasses.replace(args, x=x, weight=weight)
