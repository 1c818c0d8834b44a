"""How an op is launched when it is called by itself, on a GPU.

Checks and plans depend on what the arguments look like (shapes, strides, dtypes, numbers) and on forced launch
parameters, and take several times as long as the launch. They are made once for each look, so that a layer that is
called again pays for its memory and its launches alone.

Triton, too, looks at every argument of a launch to find the binary that was compiled for such ones. Of what matters to
it, a look leaves the alignment of the pointers open: where all are aligned, an earlier call's binaries are launched.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusion_passes import arch as architectures
from fusion_passes import config, tuning
from fusion_passes.plans import Launch, Operand, Output, Plan, Program, Target, operand_of

# Looks that an op remembers; the one that was used least recently makes room.
MOST_PREPARED = 512

# Triton compiles a binary of its own for pointers that are multiples of so many bytes.
ALIGNMENT = 16


@dataclasses.dataclass
class Prepared:
    """A call without its tensors.

    Attributes:
        program: its operands hold no tensors: the place of the argument stands in for `handle`.
        alone: whether the op returns one tensor and not several, or none.
        binaries: the launches with the binaries of an earlier call, whose pointers were aligned; empty before it.
    """

    program: Program
    alone: bool
    binaries: Sequence[Binary] = ()


class Binary:
    """A launch with the binary that Triton launched for it."""

    def __init__(self, launch: Launch, compiled: Any, written: Sequence[Output]) -> None:
        self._grid, self._compiled = launch.whole_grid, compiled
        values = [launch.args[name] for name in launch.kernel.arg_names]
        self._values = [None if isinstance(value, (Operand, Output)) else value for value in values]
        self._read = [(at, value.handle) for at, value in enumerate(values) if isinstance(value, Operand)]
        self._written = [(at, written.index(value)) for at, value in enumerate(values) if isinstance(value, Output)]

    def __call__(self, args: Sequence[Any], tensors: Sequence[torch.Tensor], stream: int) -> None:
        """Launch on the tensors among the arguments of the op and on those that were allocated for it."""
        values, compiled = self._values.copy(), self._compiled
        for at, place in self._read:
            values[at] = args[place]
        for at, place in self._written:
            values[at] = tensors[place]
        if watched():
            compiled[self._grid](*values)
            return
        # Without what Triton gathers for hooks, whether there are any or not.
        compiled.run(*self._grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


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
    results = [] if out is None else list(out) if isinstance(out, (tuple, list)) else [out]
    # An op without results writes into its first argument.
    if all(t.numel() == 0 for t in results or args[:1]):
        return None
    places = (
        dataclasses.replace(operand_of(arg), handle=place, view=place) if isinstance(arg, torch.Tensor) else arg
        for place, arg in enumerate(args)
    )
    device = (results or args)[0].device
    program = Program.of(plan(Target(architectures.of_device(device), int), *places))
    planned = [_layout(output.shape, output.strides, output.dtype) for output in program.outputs]
    promised = [_layout(result.shape, result.stride(), result.dtype) for result in results]
    if planned != promised:
        raise RuntimeError(f"the plan writes {planned} where the op returns {promised}")
    return Prepared(program, isinstance(out, torch.Tensor))


def _layout(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> tuple[Any, ...]:
    """What two equal tensors have in common: not the strides along axes of length one, and none without elements."""
    kept = () if 0 in shape else tuple(stride if n != 1 else 0 for n, stride in zip(shape, strides))
    return tuple(shape), kept, dtype


def _run(call: Prepared, args: tuple[Any, ...]) -> Any:
    program, given = call.program, [arg for arg in args if isinstance(arg, torch.Tensor)]
    device = given[0].device
    with torch.cuda.device(device):
        tensors = [_empty(output, device) for output in program.written]
        aligned = not any(tensor.data_ptr() % ALIGNMENT for tensor in (*given, *tensors))
        if aligned and call.binaries:
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            for binary in call.binaries:
                binary(args, tensors, stream)
        else:
            compiled = run(program, dict(zip(program.written, tensors)), args)
            # AMD's binaries depend on the number of bytes behind a pointer as well.
            if aligned and None not in compiled and torch.version.hip is None:
                call.binaries = [Binary(*pair, program.written) for pair in zip(program.launches, compiled)]
    return tensors[0] if call.alone else tuple(tensors[: len(program.outputs)]) or None


def watched() -> bool:
    """Do hooks, such as a profiler's, want to know of Triton's launches?"""
    knobs = _knobs()
    return any(getattr(hook, "calls", hook) for hook in (knobs.launch_enter_hook, knobs.launch_exit_hook))


@functools.cache
def _knobs() -> Any:
    from triton import knobs

    return knobs.runtime


def _empty(output: Output, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(output.shape, output.strides, dtype=output.dtype, device=device)


def run(program: Program, tensors: Mapping[Output, torch.Tensor], args: tuple[Any, ...] = ()) -> list[Any]:
    """Launch the kernels of a program on the device that is current; returns Triton's binaries.

    Args:
        program: planned for tensors.
        tensors: the memory of what is written.
        args: the tensors at the places that the program's operands name, if it was planned for places.
    """
    compiled = []
    for launch in program.launches:
        options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        if launch.pdl:
            options["launch_pdl"] = True
        compiled.append(launch.kernel[launch.grid](**launch.bound(tensors, args), **options))
    return compiled
