"""Runs the launches of a plan on any device, the interpreter included, on outputs that start as NaN."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fusion_passes.arch import by_name
from fusion_passes.eager import run as run_program
from fusion_passes.lowering import Plan, Program, Target
from fusion_passes.plans import operand_of


def poison(memory: torch.Tensor) -> torch.Tensor:
    """The tensor, filled with NaN, with the largest number of an integer dtype, or with what is no bool."""
    if memory.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        memory.view(torch.uint8).fill_(0x7F)  # NaN in both
        return memory
    if memory.dtype == torch.bool:
        memory.view(torch.uint8).fill_(0xFF)
        return memory
    return memory.fill_(math.nan if memory.is_floating_point() else torch.iinfo(memory.dtype).max)


def target_for(device: torch.device, arch: str = "sm_90", inlined: bool = False) -> Target:
    """What to plan for where launches run on this device; a CPU stands for the interpreter."""
    chosen = by_name(arch)
    # Programmatic dependent launch is an instruction of GPUs, which the interpreter does not have.
    return Target(chosen if device.type == "cuda" else dataclasses.replace(chosen, pdl=False), int, inlined)


def run(plan: Plan, args: tuple[Any, ...], arch: str = "sm_90", inlined: bool = False) -> tuple[torch.Tensor, ...]:
    """The results of the op, computed by its kernels: what no kernel wrote is NaN, scratch memory too."""
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    program = Program.of(plan(target_for(device, arch, inlined), *map(operand_of, args)))
    tensors = {
        output: poison(torch.empty_strided(output.shape, output.strides, dtype=output.dtype, device=device))
        for output in program.written
    }
    run_program(program, tensors)
    return tuple(tensors[output] for output in program.outputs)
