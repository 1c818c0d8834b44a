"""The second door, for Hugging Face models: their delta rule functions call the fused op.

    from fusion_passes.transformers import bind, unbind

    print(bind(model))
    torch.compile(model, backend="fusion_passes")  # or any backend, or none
    unbind(model)

The graph pass finds the rule in the graph that Dynamo traced, which for a long prompt is a loop of thousands of nodes
for a fixed number of chunks. Bound, a model traces to one node per layer for any number of tokens, and prompts and
steps of decoding run the same kernels, but for a compiled step of one token: it is left to Inductor, which makes a few
kernels of it that are faster. Nothing is bound unless asked for.

In transformers a layer looks its functions up by name in the module that holds its class, when it is called. That name
is what is rebound; functions that a layer holds itself are, too. So `bind(model)` serves every model of the same
architecture in the process, and `bind()` every architecture of the installed transformers, built before or after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch

from fusion_passes import delta_rule_calls

__all__ = ["Binding", "Bound", "Skipped", "bind", "unbind"]

# Names under which models call the rule: torch_chunk_gated_delta_rule, recurrent_kimi_delta_attention, chunk_kda, ...
NAME = re.compile(r"(?:torch_)?(?:chunk|recurrent|fused_recurrent)_\w*(?:delta|kda)\w*")
_DEFINITION = re.compile(rb"^def " + NAME.pattern.encode() + rb"\(", re.MULTILINE)
_NAMESPACES = ("transformers.models.", "transformers_modules.")

Owner = ModuleType | torch.nn.Module


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function that calls the fused op now; `layers` of the given model use it (None without a model)."""

    name: str
    layers: int | None = None


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A function that was left as it is, and why."""

    name: str
    reason: str


@dataclasses.dataclass(eq=False)
class Binding:
    """What one `bind` did. As a context manager it is released at the end of the block.

    A function stays bound until all `Binding`s that hold it are released, or until `unbind`.

    Attributes:
        bound: the functions that call the fused op, those included that an earlier `bind` had bound.
        skipped: the functions that do not, with the reason.
    """

    bound: list[Bound] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    _before: dict[tuple[str, str], int] = dataclasses.field(default_factory=delta_rule_calls.fallbacks, repr=False)

    @property
    def fallbacks(self) -> dict[tuple[str, str], int]:
        """How many calls since (in compiled code: traces) went to the replaced function, by its name and the reason."""
        names = {bound.name for bound in self.bound}
        counts = ((key, n - self._before.get(key, 0)) for key, n in delta_rule_calls.fallbacks().items())
        return {key: count for key, count in counts if count and key[0] in names}

    def release(self) -> None:
        """Let go of what this `bind` holds; what nobody else holds is restored. Does nothing the second time."""
        with _lock:
            for slot in list(_slots.values()):
                if self in slot.holders:
                    slot.holders.discard(self)
                    if not slot.holders:
                        slot.restore()

    def __enter__(self) -> Binding:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __str__(self) -> str:
        if not self.bound and not self.skipped:
            return "fusion_passes: nothing to bind, no delta rule function was found"
        plural = "" if len(self.bound) == 1 else "s"
        lines = [f"fusion_passes: bound {len(self.bound)} function{plural} to chunk_delta_rule"]
        for bound in self.bound:
            used = "" if bound.layers is None else f", used by {bound.layers} layer{'' if bound.layers == 1 else 's'}"
            lines.append(f"  {bound.name}{used}")
        lines += [f"  not bound: {skipped.name}\n      {skipped.reason}" for skipped in self.skipped]
        for (name, reason), count in self.fallbacks.items():
            lines.append(f"  {count} calls fell back: {name}\n      {reason}")
        return "\n".join(lines)


def bind(model: torch.nn.Module | None = None, *, replace_kernels: bool = False) -> Binding:
    """Let the delta rule functions of Hugging Face models call `torch.ops.fusion_passes.chunk_delta_rule`.

    A function is bound if it has the known parameters and computes the rule: it is compared with the op on small random
    tensors. A call that the op cannot serve goes to the function that was there, with one logged reason: gradients,
    float64, packed sequences (`cu_seqlens`), on a GPU head sizes other than 64, 96, 128, 192 and 256. On a CPU the op
    runs its PyTorch reference.

    Binding again changes nothing but is counted: with `with bind(): ...` in several places or threads the functions are
    restored when the last block ends. Code compiled before is compiled again at its next call.

    Args:
        model: bind what the layers of this model call; None: all architectures of the installed transformers.
        replace_kernels: take the place of kernels from flash-linear-attention or the Hub as well.

    Returns:
        What was bound, and what was not and why; `print(bind(model))` is readable.

    Raises:
        ImportError: transformers is not installed, or has no architecture with a delta rule.
        TypeError: `model` is not a module.
    """
    binding = Binding()
    with _lock:
        for owner, name in _functions(model):
            label, layers = _label(owner, name), None if model is None else _layers(model, owner, name)
            slot = _slots.get((id(owner), name))
            if slot is None or vars(owner)[name] is not slot.replacement:
                try:
                    slot = _Slot.fill(owner, name, label, replace_kernels)
                except _NotBindable as reason:
                    binding.skipped.append(Skipped(label, str(reason)))
                    continue
            slot.holders.add(binding)
            binding.bound.append(Bound(label, layers))
    return binding


def unbind(model: torch.nn.Module | None = None) -> list[str]:
    """Put back exactly the functions that `bind` replaced, whoever bound them and how often.

    Args:
        model: only those that the layers of this model call; None: all.

    Returns:
        The names of the functions that were restored.

    Raises:
        TypeError: `model` is not a module.
    """
    with _lock:
        keys = None if model is None else {(id(owner), name) for owner, name in _functions(model)}
        return [slot.label for key, slot in list(_slots.items()) if (keys is None or key in keys) and slot.restore()]


def kernels_of_others(model: torch.nn.Module) -> list[tuple[str, str]]:
    """The delta rule functions of a model that a kernel of flash-linear-attention or from the Hub serves, and whose."""
    served = []
    for owner, name in _functions(model):
        _, kernel = _unwrap(vars(owner)[name])
        if kernel is not None:
            served.append((_label(owner, name), _whose(kernel, name)))
    return served


# --- one rebound name ------------------------------------------------------------------------------------------------


class _NotBindable(Exception):
    """The message says why a function is left as it is."""


@dataclasses.dataclass(eq=False)
class _Slot:
    owner: weakref.ref[Any]
    key: tuple[int, str]
    label: str
    original: Callable[..., Any]
    replacement: Callable[..., Any]
    holders: set[Binding] = dataclasses.field(default_factory=set)

    @staticmethod
    def fill(owner: Owner, name: str, label: str, replace_kernels: bool) -> _Slot:
        """Rebind a name, or raise `_NotBindable`."""
        original = vars(owner)[name]
        spelled, kernel = _unwrap(original)
        if kernel is not None and not replace_kernels:
            raise _NotBindable(f"{_whose(kernel, name)} is in place; bind(replace_kernels=True) takes its place")
        make = delta_rule_calls.stand_in(spelled)
        if make is None:
            raise _NotBindable(f"its parameters are not those that are known: {inspect.signature(spelled)}")
        dims = delta_rule_calls.decay_dims(spelled, chunked=make is delta_rule_calls.chunk_call)
        if not dims:
            raise _NotBindable("it computes something else than chunk_delta_rule")
        understood = set() if kernel is None else set(inspect.signature(kernel).parameters)
        heeded = {delta_rule_calls.PACKED, *(understood - set(inspect.signature(spelled).parameters))}
        replacement = make(delta_rule_calls.Replaced(original, label, dims, tuple(sorted(heeded))))
        key = (id(owner), name)
        slot = _Slot(weakref.ref(owner, lambda _: _slots.pop(key, None)), key, label, original, replacement)
        setattr(owner, name, replacement)
        _slots[key] = slot
        return slot

    def restore(self) -> bool:
        """Put the original back, unless somebody else has rebound the name since; whether it was put back."""
        _slots.pop(self.key, None)
        owner, name = self.owner(), self.key[1]
        if owner is None or vars(owner).get(name) is not self.replacement:
            return False
        setattr(owner, name, self.original)
        return True


_lock = threading.RLock()
_slots: dict[tuple[int, str], _Slot] = {}


def _unwrap(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """The PyTorch function behind a name, and the kernel that serves calls in its stead, if any.

    transformers decorates its functions: the package `kernels` makes a module of each, whose forward it replaces by a
    kernel from the Hub on request; within, a function calls flash-linear-attention where that is installed.
    """
    kernel: Callable[..., Any] | None = None
    if isinstance(function, torch.nn.Module):
        kernel = vars(function).get("forward")
        function = _variables(type(function).forward).get("func", function)
    inner = _variables(function)
    spelled = inner.get("torch_function", inspect.unwrap(function))
    implementation = inner.get("implementation", spelled)
    return spelled, kernel or (None if implementation is spelled else implementation)


def _whose(kernel: Callable[..., Any], name: str) -> str:
    return f"{getattr(kernel, '__module__', '').partition('.')[0]}'s {getattr(kernel, '__name__', name)}"


def _variables(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function closes over, by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    found = {}
    for name, cell in zip(code.co_freevars if code else (), cells or ()):
        with contextlib.suppress(ValueError):  # not assigned yet
            found[name] = cell.cell_contents
    return found


# --- where the functions are -----------------------------------------------------------------------------------------


def _functions(model: torch.nn.Module | None) -> Iterator[tuple[Owner, str]]:
    """Every name that holds a delta rule function, in the Python modules of a model or of transformers."""
    owners: list[Owner]
    if model is None:
        owners = list(_modeling_modules())
    elif isinstance(model, torch.nn.Module):
        names = {cls.__module__: None for layer in model.modules() for cls in type(layer).__mro__}
        owners = [sys.modules[name] for name in names if name in sys.modules]
        owners += [layer for layer in model.modules() if any(map(NAME.fullmatch, vars(layer)))]
    else:
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    for owner in owners:
        if owner.__name__.startswith(__package__ + ".") if isinstance(owner, ModuleType) else False:
            continue  # the op itself
        for name, value in list(vars(owner).items()):
            if NAME.fullmatch(name) and callable(value):
                yield owner, name


def _modeling_modules() -> Iterator[ModuleType]:
    """The modules of the installed transformers that define a delta rule, and those of remote code that are loaded."""
    names = dict.fromkeys(_architectures())
    loaded = (name for name in list(sys.modules) if name.startswith(_NAMESPACES) and ".modeling_" in name)
    for name in [*names, *(name for name in loaded if name not in names)]:
        yield importlib.import_module(name)


@functools.cache
def _architectures() -> tuple[str, ...]:
    """Names of the modules of transformers that define a delta rule function, from their sources."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("bind() needs transformers: pip install 'fusion-passes[transformers]'")
    package = importlib.import_module("transformers")
    folder = Path(inspect.getfile(package)).parent
    paths = sorted(path for path in folder.glob("models/*/modeling_*.py") if _DEFINITION.search(path.read_bytes()))
    if not paths:
        version = package.__version__
        raise ImportError(f"transformers {version} has no delta rule function: pip install 'transformers>=5.17'")
    return tuple(f"transformers.models.{path.parent.name}.{path.stem}" for path in paths)


def _label(owner: Owner, name: str) -> str:
    return f"{owner.__name__ if isinstance(owner, ModuleType) else type(owner).__qualname__}.{name}"


def _layers(model: torch.nn.Module, owner: Owner, name: str) -> int:
    """How many layers of a model call the function: its name occurs in their forward."""
    if not isinstance(owner, ModuleType):
        return 1
    forwards = (inspect.unwrap(type(layer).forward) for layer in model.modules())
    return sum(f.__module__ == owner.__name__ and name in f.__code__.co_names for f in forwards)
