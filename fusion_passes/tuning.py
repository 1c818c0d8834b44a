"""Launch parameters: a tuned table per op, and the ways to override it.

A table is a JSON file beside the op. It maps an architecture ("default" stands for any other) and a shape class to
a list of entries in order of size; the first whose "up_to" is not exceeded (null: no limit) is taken:

    {"default": {"channel": [{"up_to": 4194304, "rows": 16, "lanes": 64, "warps": 1},
                             {"up_to": null, "rows": 16, "lanes": 128, "warps": 1}]}}

Overrides name any of the parameters, "rows=16,lanes=128". They come from `overriding(...)`, or else from the setting
`launch`: "gate_cumsum: rows=16, lanes=128; other_op: warps=4".
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fusion_passes import config
from fusion_passes.arch import Architecture

Parameters = dict[str, int]
# Why these parameters cannot run, in words, or None.
Complaint = str | None

SETTING = "the setting launch"

# Every table of this process by the name of its op.
TABLES: dict[str, TunedTable] = {}

_forced: contextvars.ContextVar[Mapping[str, Parameters] | None] = contextvars.ContextVar(
    "launch_overrides", default=None
)


class TunedTable:
    """The tuned launch parameters of one op.

    Args:
        op: the op's name.
        path: the JSON file.
        names: the parameters that every entry gives. Their values are powers of two.
        may_be_zero: parameters for which 0 is allowed too.
        counts: parameters that may be any positive number.
    """

    def __init__(
        self, op: str, path: Path, names: tuple[str, ...], may_be_zero: tuple[str, ...] = (),
        counts: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.op, self.names, self.may_be_zero, self.counts = op, names, may_be_zero, counts
        TABLES[op] = self
        self.entries: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(path.read_text())
        for arch, classes in self.entries.items():
            for shape_class, rows in classes.items():
                for row in rows:
                    values = {name: value for name, value in row.items() if name != "up_to"}
                    if set(values) != set(names) or "up_to" not in row:
                        raise ValueError(
                            f"{path.name}: {arch}/{shape_class} must give up_to, {', '.join(names)}: {row}"
                        )
                    self.validate(values, f"{path.name}, {arch}/{shape_class}")

    def tuned(self, arch: Architecture, shape_class: str, size: int) -> Parameters:
        """The table's entry for a shape class and a size in elements."""
        classes = self.entries.get(arch.name, {})
        rows = classes.get(shape_class) or self.entries["default"][shape_class]
        row = next(r for r in rows if r["up_to"] is None or size <= r["up_to"])
        return {name: row[name] for name in self.names}

    def override(self) -> tuple[Parameters, str]:
        """The parameters that the user forces, and where they were given; empty where nothing is forced."""
        forced = (_forced.get() or {}).get(self.op)
        if forced is not None:
            return self.validate(forced, "tuning.overriding"), "tuning.overriding"
        launch = config.launch
        text = split_ops(launch).get(self.op) if isinstance(launch, str) else None
        if text:
            return self.validate(parse(text, SETTING), SETTING), SETTING
        return {}, ""

    def choose(
        self, arch: Architecture, shape_class: str, size: int,
        fit: Callable[[Parameters], Parameters], complaint: Callable[[Parameters], Complaint],
    ) -> Parameters:  # fmt: skip
        """The parameters to launch with.

        Args:
            arch: the GPU.
            shape_class: the key of the table's second level.
            size: elements, as the table counts them.
            fit: adapts a table entry to the shape; forced values are never changed.
            complaint: why parameters cannot run on the GPU or with the shape, in words, or None.

        Raises:
            ValueError: forced parameters that cannot run; the message says why and where they were given.
        """
        forced, where = self.override()
        parameters = {**fit(self.tuned(arch, shape_class, size)), **forced}
        if reason := complaint(parameters):
            given = f"{where} gives {forced}" if forced else "the tuned table gives parameters that do not fit"
            raise ValueError(f"{self.op}: {given}, but {reason}")
        return parameters

    def validate(self, values: Mapping[str, Any], where: str) -> Parameters:
        """The values as they are, all names known and all numbers allowed.

        Raises:
            ValueError: an unknown name or a value that is no power of two (no 0 or 1 for a switch).
        """
        for name, value in values.items():
            if name not in self.names:
                raise ValueError(f"{where}: {self.op} has no launch parameter {name!r}; it has {', '.join(self.names)}")
            least = 0 if name in self.may_be_zero else 1
            uneven = name not in self.counts and isinstance(value, int) and value & (value - 1)
            if not isinstance(value, int) or value < least or uneven:
                zero = "0 or " if least == 0 else ""
                wanted = "a positive number" if name in self.counts else "a power of two"
                raise ValueError(f"{where}: {name} of {self.op} must be {zero}{wanted}, got {value!r}")
        return dict(values)


@functools.lru_cache(maxsize=64)
def _parse(text: str, where: str) -> tuple[tuple[str, int], ...]:
    pairs = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or not value.isdigit():
            raise ValueError(f"{where}: launch parameters are written 'name=number,name=number', got {item!r}")
        pairs.append((name, int(value)))
    return tuple(pairs)


def parse(text: str, where: str) -> Parameters:
    """The parameters in "rows=16,lanes=128".

    Raises:
        ValueError: an item is not of the form name=number.
    """
    return dict(_parse(text, where))


def split_ops(text: str) -> dict[str, str]:
    """The texts per op in "gate_cumsum: rows=16; other_op: warps=4".

    Raises:
        ValueError: a part names no op.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        op, colon, values = part.partition(":")
        if not colon:
            raise ValueError(f"the setting launch is written 'op: name=number, ...; op: ...', got {part!r}")
        found[op.strip()] = values
    return found


def check(text: str) -> None:
    """Raise ValueError unless `text` is a valid `launch` setting: known ops, known parameters, allowed values."""
    for op, values in split_ops(text).items():
        if op not in TABLES:
            raise ValueError(f"{SETTING}: there is no tuned op {op!r}; there are {', '.join(sorted(TABLES))}")
        TABLES[op].validate(parse(values, SETTING), SETTING)


def forced() -> bool:
    """Whether launch parameters are forced by `overriding` here."""
    return bool(_forced.get())


@contextlib.contextmanager
def overriding(**ops: str | Mapping[str, int]) -> Iterator[None]:
    """Force launch parameters inside the block: `overriding(gate_cumsum="rows=16,lanes=128")` or a mapping."""
    values = {
        op: parse(given, "tuning.overriding") if isinstance(given, str) else dict(given) for op, given in ops.items()
    }
    token = _forced.set({**(_forced.get() or {}), **values})
    try:
        yield
    finally:
        _forced.reset(token)
