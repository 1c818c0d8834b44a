"""What the checks of several ops' arguments share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_P = ParamSpec("_P")
_R = TypeVar("_R")

# What an annotation of a public function lets through, and what an error calls it.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "Tensor": ((torch.Tensor,), "a tensor"),
    "int": ((int, torch.SymInt), "an integer"),
    "float": ((float, int, torch.SymFloat, torch.SymInt), "a number"),
    "bool": ((bool, torch.SymBool), "a bool"),
    "str": ((str,), "a string"),
    "torch.dtype": ((torch.dtype,), "a torch.dtype"),
    "Sequence[int]": ((list, tuple), "a list of integers"),
    "None": ((type(None),), "None"),
}


def typed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function with a check of its arguments' types against its annotations, which are among those of `_KINDS`.

    Without it torch raises a RuntimeError that names the argument of the op, or Python one that names none.

    Raises:
        TypeError: an argument is of another type; the message names it, what it is and what it must be.
    """
    rules: dict[str, tuple[tuple[type, ...], str]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kinds = [_KINDS[kind] for kind in str(parameter.annotation).split(" | ")]
        rules[name] = tuple(t for types, _ in kinds for t in types), " or ".join(words for _, words in kinds)
    names = tuple(rules)

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name, value in (*zip(names, args), *kwargs.items()):
            if name in rules and not isinstance(value, rules[name][0]):
                raise TypeError(f"{name} must be {rules[name][1]}, got {type(value).__name__}")
            if isinstance(value, (list, tuple)) and not all(isinstance(n, (int, torch.SymInt)) for n in value):
                raise TypeError(f"{name} must be {rules[name][1]}, got {value!r}")
        return function(*args, **kwargs)

    return checked


def known_different(left: Any, right: Any) -> bool:
    """Are two sizes numbers, and not the same? Symbolic sizes are not compared: that would add a guard."""
    return isinstance(left, int) and isinstance(right, int) and left != right


def check_shape(name: str, t: torch.Tensor, wanted: Sequence[Any], axes: str) -> None:
    """`t` has the sizes `wanted`, as far as they are known; `axes` says what they are, such as "[B, T, H]".

    Raises:
        ValueError: another number of axes, or another size.
    """
    if t.dim() != len(wanted) or any(map(known_different, t.shape, wanted)):
        raise ValueError(f"{name} must be {axes} = {list(wanted)}, got shape {list(t.shape)}")
