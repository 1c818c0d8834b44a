"""How an op is launched when it is called by itself, on a GPU.

Checks and plans depend on what the arguments look like (shapes, strides, dtypes, numbers) and on forced launch
parameters, and take several times as long as the launch. They are made once for each look, so that a layer that is
called again pays for its memory and its launches alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fusion_passes import arch as architectures
from fusion_passes import config, tuning
from fusion_passes.plans import Output, Plan, Program, Target, operand_of

# Looks that an op remembers; the one that was used least recently makes room.
MOST_PREPARED = 512


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A call without its tensors.

    Attributes:
        program: its operands hold no tensors: the place of the argument stands in for `handle`.
        results: what the op returns, as the fake allocates it.
        alone: whether that is one tensor and not several.
    """

    program: Program
    results: tuple[Output, ...]
    alone: bool


def launcher(fake: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """The CUDA implementation of an op. `fake` checks arguments and allocates results, `plan` says what is launched."""

    @functools.lru_cache(maxsize=MOST_PREPARED)
    def prepared(look: _Look) -> Prepared | None:
        return _prepare(fake, plan, look.args)

    def launch(*args: Any) -> Any:
        if tuning.forced():
            call = _prepare(fake, plan, args)
        else:
            look = _Look(args)
            call = prepared(look)
            look.args = ()  # the cache may keep the look, and must not keep the tensors
        return fake(*args) if call is None else _run(call, args)

    return launch


class _Look:
    """Arguments, equal to others where checks and plans cannot tell them apart."""

    __slots__ = ("args", "key")

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.key = (config.launch, *map(_look_of, args))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Look) and self.key == other.key


def _look_of(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return arg.shape, arg.stride(), arg.dtype, arg.device
    if isinstance(arg, (list, tuple)):
        return tuple(map(_look_of, arg))
    # 1, 1.0 and True are equal, and so are the two zeros.
    return type(arg), arg.hex() if isinstance(arg, float) else arg


def _prepare(fake: Callable[..., Any], plan: Plan, args: tuple[Any, ...]) -> Prepared | None:
    """The call, checked and planned; None where there is nothing to compute."""
    out = fake(*args)
    results = list(out) if isinstance(out, (tuple, list)) else [out]
    if all(t.numel() == 0 for t in results):
        return None
    places = (
        dataclasses.replace(operand_of(arg), handle=place, view=place) if isinstance(arg, torch.Tensor) else arg
        for place, arg in enumerate(args)
    )
    program = Program.of(plan(Target(architectures.of_device(results[0].device), int), *places))
    allocated = tuple(Output(tuple(t.shape), t.stride(), t.dtype) for t in results)
    return Prepared(program, allocated, not isinstance(out, (tuple, list)))


def _run(call: Prepared, args: tuple[Any, ...]) -> Any:
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device(device):
        results = [_empty(result, device) for result in call.results]
        tensors = dict(zip(call.program.outputs, results))
        for scratch in call.program.written[len(results) :]:
            tensors[scratch] = _empty(scratch, device)
        run(call.program, tensors, args)
    return results[0] if call.alone else tuple(results)


def _empty(output: Output, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(output.shape, output.strides, dtype=output.dtype, device=device)


def run(program: Program, tensors: Mapping[Output, torch.Tensor], args: tuple[Any, ...] = ()) -> None:
    """Launch the kernels of a program on the device that is current.

    Args:
        program: planned for tensors.
        tensors: the memory of what is written.
        args: the tensors at the places that the program's operands name, if it was planned for places.
    """
    for launch in program.launches:
        options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        if launch.pdl:
            options["launch_pdl"] = True
        launch.kernel[launch.grid](**launch.bound(tensors, args), **options)
