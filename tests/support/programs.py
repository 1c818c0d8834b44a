"""Runs the launches of a plan on any device, the interpreter included, on outputs that start as NaN."""

from __future__ import annotations

import math
from typing import Any

import torch

from fusion_passes.arch import by_name
from fusion_passes.lowering import Operand, Output, Plan, Target, _operand, _program


def run(plan: Plan, args: tuple[Any, ...], arch: str = "sm_90") -> tuple[torch.Tensor, ...]:
    """The results of the op, computed by its kernels: what no kernel wrote is NaN, scratch memory too."""
    program = _program(plan(Target(by_name(arch), int), *map(_operand, args)))
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    tensors: dict[Output, torch.Tensor] = {}
    for output in (*program.outputs, *(output for launch in program.launches for output in launch.outputs)):
        if output not in tensors:
            tensors[output] = torch.full(output.shape, math.nan, dtype=output.dtype, device=device)
    for launch in program.launches:
        values = {
            name: value.handle if isinstance(value, Operand) else tensors[value] if isinstance(value, Output) else value
            for name, value in launch.args.items()
        }
        launch.kernel[launch.grid](**values, num_warps=launch.num_warps, num_stages=launch.num_stages)
    return tuple(tensors[output] for output in program.outputs)
