"""Tables of spellings and look-alikes: functions with the case that each means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

Function = Callable[..., Any]


class Case(Protocol):
    """What a function computes, and from what."""

    def inputs(self) -> tuple[Any, ...]: ...


C = TypeVar("C", bound=Case)


@dataclasses.dataclass(frozen=True)
class Entry(Generic[C]):
    """A function with the case it means, or for a look-alike the reason that must be given."""

    function: Function
    case: C
    reason: str = ""
    make: Callable[[], tuple[Any, ...]] | None = None

    def inputs(self) -> tuple[Any, ...]:
        return self.case.inputs() if self.make is None else self.make()


def entry(
    kind: Callable[..., C],
    table: dict[str, Entry[C]],
    reason: str = "",
    make: Callable[[], tuple[Any, ...]] | None = None,
    **case: Any,
) -> Callable[[Function], Function]:
    """Put the decorated function in `table` under its own name, with the case of a kind that the rest describes."""

    def put(function: Function) -> Function:
        name = function.__name__
        assert name not in table, f"two entries named {name}"
        table[name] = Entry(function, kind(**case), reason, make)
        return function

    return put
