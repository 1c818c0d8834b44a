"""What a plan is made of: operands, launches, and the sizes in them, which may be symbolic.

A plan turns an op's arguments into launches of kernels, for an eager call (`fusion_passes.eager`, with integers) and
for a compiled graph (`fusion_passes.lowering`, with Inductor's sizes).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.utils._sympy.functions import CeilDiv

from fusion_passes.arch import Architecture

# A number that may be symbolic in a lowering.
Size = Any


class NotInlinable(Exception):
    """A plan raises this in a lowering to keep the op opaque; the message says why."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor argument as a plan sees it: where it lies, in elements from the start of `handle`.

    In a lowering `handle` is the buffer that holds the tensor, which costs the wrapper nothing to pass, and `view`
    the tensor itself. Kernels that take an offset use the first, others `whole()`.
    """

    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size
    dtype: torch.dtype
    device: torch.device
    handle: Any
    view: Any

    @property
    def used_strides(self) -> tuple[Size, ...]:
        """The strides, 0 along axes of length one: their stride means nothing and must not compile a kernel anew."""
        return tuple(0 if static(n) == 1 else stride for n, stride in zip(self.shape, self.strides))

    def whole(self) -> Operand:
        """The operand with its offset, if it has one, inside the handle."""
        if static(self.offset) == 0:
            return self
        return dataclasses.replace(self, offset=0, handle=self.view)


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """A tensor that a launch writes; every element that anybody reads. One object is one tensor."""

    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the `triton.jit` function.
        grid: one to three sizes.
        args: every argument of the kernel by name: `Operand`, `Output`, number or None. constexprs included. With
            "PDL" among them and true, the launch is a programmatic dependent one: the kernel may start before the one
            ahead of it has ended, and waits for it itself. With "LEADS" it lets the one behind it start so.
        num_warps, num_stages: as Triton takes them.
    """

    kernel: Any
    grid: tuple[Size, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int = 1

    @property
    def pdl(self) -> bool:
        return bool(self.args.get("PDL"))

    @property
    def whole_grid(self) -> tuple[Size, ...]:
        """The grid with all three sizes."""
        return (*self.grid, *(1,) * (3 - len(self.grid)))

    @property
    def outputs(self) -> tuple[Output, ...]:
        return tuple(value for value in self.args.values() if isinstance(value, Output))

    def bound(self, tensors: Mapping[Output, Any], args: Sequence[Any] = ()) -> dict[str, Any]:
        """The arguments as the kernel takes them: outputs from `tensors`, and operands from `args`, if it is given and
        their handles are places in it."""

        def of(value: Any) -> Any:
            if isinstance(value, Operand):
                return args[value.handle] if args else value.handle
            return tensors[value] if isinstance(value, Output) else value

        return {name: of(value) for name, value in self.args.items()}


@dataclasses.dataclass(frozen=True)
class Program:
    """Launches that run one after the other.

    Attributes:
        launches: in order; those after the first may take `Output`s of earlier ones as inputs.
        outputs: the results of the op, in order. Every other `Output` is scratch memory, freed after its last use.
    """

    launches: tuple[Launch, ...]
    outputs: tuple[Output, ...]

    @staticmethod
    def of(plan: Launch | Program) -> Program:
        """What a plan returned as a program."""
        return plan if isinstance(plan, Program) else Program((plan,), plan.outputs)

    @functools.cached_property
    def written(self) -> tuple[Output, ...]:
        """All that is to be allocated: the results, and then scratch memory."""
        scratch = (output for launch in self.launches for output in launch.outputs)
        return tuple(dict.fromkeys((*self.outputs, *scratch)))


@dataclasses.dataclass(frozen=True)
class Target:
    """What a plan is made for.

    Attributes:
        arch: the GPU.
        hint: a guess at a size that is symbolic.
        inlined: whether the launches go into a compiled graph.
    """

    arch: Architecture
    hint: Callable[[Size], int]
    inlined: bool = False


Plan = Callable[..., Launch | Program]


def cdiv(a: Size, b: int) -> Size:
    """a / b rounded up, for integers and symbolic sizes."""
    return CeilDiv(a, b) if isinstance(a, sympy.Expr) else -(-a // b)


def static(size: Size) -> int | None:
    """The value of a size that is known when the graph is compiled, else None."""
    if isinstance(size, int):
        return size
    return int(size) if isinstance(size, sympy.Integer) else None


def constant_or_argument(
    target: Target, constant: str, argument: str, value: Size, always: bool = False
) -> dict[str, Size | None]:
    """A number for a kernel that takes it compiled in, as `constant`, or where that is -1 as the run-time `argument`.

    A kernel inside a compiled graph takes all that are known as constants: arguments cost time at every call. An eager
    one takes those that are `always` the same, whatever the number of tokens: a new one must not compile a new kernel.
    """
    known = static(value) is not None and (target.inlined or always)
    return {constant: value if known else -1, argument: None if known else value}


def contiguous_strides(shape: Sequence[Size]) -> tuple[Size, ...]:
    strides: list[Size] = []
    step: Size = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))


def operand_of(value: Any) -> Any:
    """A tensor as an operand; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return Operand(tuple(value.shape), value.stride(), 0, value.dtype, value.device, value, value)
