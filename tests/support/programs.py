"""Runs the launches of a plan on any device, the interpreter included, on outputs that start as NaN."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fusion_passes.arch import by_name
from fusion_passes.lowering import Plan, Program, Target, _operand
from fusion_passes.lowering import run as run_program


def run(plan: Plan, args: tuple[Any, ...], arch: str = "sm_90", inlined: bool = False) -> tuple[torch.Tensor, ...]:
    """The results of the op, computed by its kernels: what no kernel wrote is NaN, scratch memory too."""
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    on_gpu = device.type == "cuda"
    # Programmatic dependent launch is an instruction of GPUs, which the interpreter does not have.
    target_arch = by_name(arch) if on_gpu else dataclasses.replace(by_name(arch), pdl=False)
    program = Program.of(plan(Target(target_arch, int, inlined), *map(_operand, args)))
    tensors = {
        output: torch.empty_strided(output.shape, output.strides, dtype=output.dtype, device=device).copy_(
            torch.full(output.shape, math.nan, device=device)
        )
        for output in program.written
    }
    run_program(program, tensors)
    return tuple(tensors[output] for output in program.outputs)
