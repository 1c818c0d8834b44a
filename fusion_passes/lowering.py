"""How an op of this package is registered, and inlined by Inductor.

An op is a schema, a reference in plain PyTorch (the CPU implementation), shape checks (the fake implementation) and a
*plan*: a function that turns the op's arguments into one `Launch`. The same plan serves the eager CUDA call, with
integers, and the lowering, with Inductor's symbolic sizes, so that there is one launch choice.

Inlined means that the generated wrapper launches the Triton kernel itself, on the buffers that hold the inputs and
on outputs allocated beside the call. On CPU, with inlining off, or for shapes that the plan cannot serve, the op stays
an opaque call.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor import ir
from torch._inductor import lowering as inductor
from torch._inductor.utils import convert_shape_to_inductor
from torch._inductor.virtualized import V

from fusion_passes import arch as architectures
from fusion_passes import tuning
from fusion_passes.eager import launcher
from fusion_passes.plans import (
    Launch,
    NotInlinable,
    Operand,
    Output,
    Plan,
    Program,
    Size,
    Target,
    cdiv,
    constant_or_argument,
    contiguous_strides,
    static,
)
from fusion_passes.settings import LAUNCH_META, snapshot

# What the author of an op needs: the parts of a plan, and `define`.
__all__ = [
    "LIBRARY",
    "Launch",
    "NotInlinable",
    "Operand",
    "Output",
    "Plan",
    "Program",
    "Size",
    "Target",
    "cdiv",
    "constant_or_argument",
    "contiguous_strides",
    "define",
    "inline",
    "inlining",
    "inlining_enabled",
    "static",
]

log = logging.getLogger(__name__)

LIBRARY = torch.library.Library("fusion_passes", "FRAGMENT")

# Readers of a result as another shape, which their own metadata says.
_RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)

_inlining: contextvars.ContextVar[bool] = contextvars.ContextVar("inlining", default=True)


def inlining_enabled() -> bool:
    """Whether lowerings launch kernels from the generated wrapper (the default) or call the op."""
    return _inlining.get()


@contextlib.contextmanager
def inlining(enabled: bool) -> Iterator[None]:
    """Switch inlining on or off for the compiles inside the block."""
    token = _inlining.set(enabled)
    try:
        yield
    finally:
        _inlining.reset(token)


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    plan: Plan,
    backward: str,
    keep_stride_order: bool = False,
) -> torch._ops.OpOverload:
    """Register `torch.ops.fusion_passes.<name>` and its lowering.

    Args:
        name: the op's name.
        schema: the part of the schema after the name, "(Tensor x, int n) -> Tensor".
        reference: the CPU implementation.
        fake: checks the arguments' metadata and returns empty outputs.
        plan: `plan(target, *args)` with tensors as `Operand`s; a `Program` where one launch is not enough. May
            raise `NotInlinable` on symbolic sizes.
        backward: why there is no gradient; the message of the error that a backward pass raises.
        keep_stride_order: the fake refuses some orders of strides. Inductor is free to lay out a tensor that it
            computes itself otherwise than the graph says, unless it is told.

    Returns:
        The overload `torch.ops.fusion_passes.<name>.default`.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CPU")
    LIBRARY.impl(name, launcher(fake, plan), "CUDA")
    torch.library.register_fake(f"fusion_passes::{name}", fake, lib=LIBRARY)

    def no_gradient(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(backward)

    torch.library.register_autograd(f"fusion_passes::{name}", no_gradient, lib=LIBRARY)
    op = getattr(torch.ops.fusion_passes, name).default
    inline(op, plan)
    if keep_stride_order:
        inductor.add_layout_constraint(op, inductor.constrain_to_fx_strides)
    return op


def inline(op: torch._ops.OpOverload, plan: Plan) -> None:
    """Register a lowering of `op` that launches the plan's kernel from Inductor's wrapper."""
    call = inductor.fallback_handler(op, add_to_fallback_set=False)

    def fallback(*args: Any) -> Any:
        # Whoever reads memory that `op` overwrites comes first: Inductor adds a fallback before it adds such readers.
        for _, value in _overwritten(op, args):
            V.graph.mark_buffer_mutated(ir.ExternKernel.realize_input(value).get_name())
        return call(*args)

    @inductor.register_lowering(op, type_promotion_kind=None)
    def lower(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, ir.TensorBox)).get_device()
        if device is None or device.type != "cuda" or not inlining_enabled():
            return fallback(*args)
        _check_in_place(op, args)
        target = Target(architectures.of_device(device), _hint, inlined=True)
        try:
            _refuse_symbolic(args)
            with tuning.overriding(**tuning.split_ops(_launch_setting())):
                program = Program.of(plan(target, *map(_base, args)))
        except NotInlinable as reason:
            log.info("%s stays an opaque call: %s", op, reason)
            return fallback(*args)
        return _emit(program, device)


def _launch_setting() -> str:
    """The `launch` setting of the compile that put the op into the graph, else the one in force."""
    node = V.get_current_node()
    setting = node.meta.get(LAUNCH_META) if node is not None else None
    return str(setting if setting is not None else snapshot().launch)


def _refuse_symbolic(args: Sequence[Any]) -> None:
    for arg in args:
        if isinstance(arg, ir.TensorBox) and any(static(size) == 0 for size in arg.get_size()):
            raise NotInlinable("one of its tensors is empty")


def _overwritten(op: torch._ops.OpOverload, args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The arguments that `op` writes into, with their names."""
    for argument, value in zip(op._schema.arguments, args):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield argument.name, value


def _check_in_place(op: torch._ops.OpOverload, args: Sequence[Any]) -> None:
    """Inductor copies a view that strides cannot describe, and a kernel would then write into the copy."""
    for name, value in _overwritten(op, args):
        memory = value.data.unwrap_view() if isinstance(value.data, ir.BaseView) else value.data
        memory.realize()
        if ir.ExternKernel.realize_input(value).get_name() != memory.get_name():
            raise RuntimeError(f"{op} would write into a copy of its argument {name}")


def _hint(size: Size) -> int:
    # A guess for the launch choice only: adds no guard, unlike evaluating the expression.
    return (
        size if isinstance(size, int) else int(V.graph.sizevars.optimization_hint(sympy.sympify(size), fallback=8192))
    )


def _base(value: Any) -> Any:
    """A tensor of the graph as the buffer that holds it, with the view's strides and offset beside it."""
    if not isinstance(value, ir.TensorBox):
        return value
    node: Any = ir.ExternKernel.realize_input(value)
    if isinstance(node, ir.TensorBox):
        node = node.data
    if not isinstance(node, ir.ReinterpretView):
        node.freeze_layout()
    layout = node.get_layout()
    shape, strides = tuple(map(_plain, layout.size)), tuple(map(_plain, layout.stride))
    offset, holder = _plain(layout.offset), node
    if isinstance(node, ir.ReinterpretView):
        # A view that changes the dtype too has no offset in elements of its buffer.
        same = node.data.get_dtype() == node.get_dtype()
        offset, holder = (offset, node.data) if same else (0, node)
    device = node.get_device()
    assert device is not None
    return Operand(shape, strides, offset, node.get_dtype(), device, ir.TensorBox(holder), ir.TensorBox(node))


def _plain(size: Size) -> Size:
    known = static(size)
    return size if known is None else known


@functools.lru_cache(maxsize=256)
def _with_config(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """The kernel with its warps and stages fixed: Inductor takes them from an autotuner of one configuration."""
    import triton

    return triton.autotune(configs=[triton.Config({}, num_warps=num_warps, num_stages=num_stages)], key=[])(kernel)


# A wrapper that was saved by itself runs where this package is not installed.
STRAIGHT = """try:
    from fusion_passes.launching import straight
except ImportError:
    def straight(kernel):
        return kernel"""


class _KernelLaunch(ir.UserDefinedTritonKernel):
    """A kernel that is launched by the short way, and may take part in programmatic dependent launch.

    Inductor's analysis of what a kernel writes gives up at the instructions for it, and takes all inputs for written:
    it is shown the kernel without them. It compiles and launches kernels dependently whose `triton_meta` asks for it,
    but writes that for its own ones alone.
    """

    def __init__(self, *, kernel_args: dict[str, Any], **rest: Any) -> None:
        dependent = {name: value for name, value in kernel_args.items() if name in ("PDL", "LEADS")}
        super().__init__(kernel_args={**kernel_args, **dict.fromkeys(dependent, False)}, **rest)
        self.kwargs.update(dependent)

    def codegen(self, wrapper: Any) -> None:
        define = wrapper.define_kernel

        def ours(name: str, body: str, *rest: Any, **named: Any) -> None:
            if self.kwargs.get("PDL"):
                body = body.replace("triton_meta={", "triton_meta={'launch_pdl': True, ", 1)
            # Wrappers that are no Python programs launch in ways of their own.
            if not (V.graph.cpp_wrapper or V.graph.fx_wrapper):
                wrapper.add_import_once(STRAIGHT)
                body = f"straight({body})"
            define(name, body, *rest, **named)

        wrapper.define_kernel = ours
        try:
            super().codegen(wrapper)
        finally:
            del wrapper.define_kernel


def _emit(program: Program, device: torch.device) -> Any:
    """Allocate what the launches write and put them into the graph."""
    tensors: dict[Output, ir.TensorBox] = {}
    for output in program.written:
        shape, strides = _as_read(program, output)
        tensors[output] = inductor.empty_strided(list(shape), list(strides), dtype=output.dtype, device=device)
        tensors[output].realize()
    for launch in program.launches:
        _KernelLaunch(
            kernel_idx=kernel_side_table.add_kernel(_with_config(launch.kernel, launch.num_warps, launch.num_stages)),
            grid=[launch.whole_grid],
            tma_descriptor_metadata={},
            kernel_args=launch.bound(tensors),
        )
    outputs = [tensors[output] for output in program.outputs]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _as_read(program: Program, output: Output) -> tuple[Sequence[Size], Sequence[Size]]:
    """The shape and strides to allocate: for a result that is read as another shape alone, those of that.

    A view costs the wrapper about as much as an allocation.
    """
    if output in program.outputs and tuple(output.strides) == contiguous_strides(output.shape):
        readers, shape = _readers(program.outputs.index(output) if len(program.outputs) > 1 else None), output.shape
        while len(readers) == 1 and readers[0].target in _RESHAPES:
            shape = tuple(convert_shape_to_inductor(readers[0].meta["val"].shape))
            readers = list(readers[0].users)
        return shape, contiguous_strides(shape)
    return output.shape, output.strides


def _readers(place: int | None) -> list[torch.fx.Node]:
    """Who reads the result of the node that is lowered; of several results that at `place`."""
    users = list(getattr(V.get_current_node(), "users", ()))
    if place is None:
        return users
    return [reader for item in users if item.args[1:] == (place,) for reader in item.users]
