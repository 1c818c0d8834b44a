"""A validated snapshot of the configuration, and the `fusion_passes.*` options of `torch.compile`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from fusion_passes import config, expectation

OPTION_PREFIX = "fusion_passes."

# Key of node.meta under which a fused op keeps the `launch` setting of its compile for the lowering.
LAUNCH_META = "fusion_passes_launch"


@dataclasses.dataclass(frozen=True)
class Settings:
    """A validated, hashable snapshot of `fusion_passes.config`, one attribute for each entry."""

    enabled: bool | None
    fusions: str
    strict: bool
    verify: bool
    reference_on_cpu: bool
    always_profitable: bool
    arch: str
    expect: str
    launch: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            allowed = _TYPES[field.name]
            if not isinstance(value, allowed):
                names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
                raise TypeError(
                    f"fusion_passes.{field.name} must be {names}, got {value!r} of type {type(value).__name__}"
                )


_TYPES: dict[str, tuple[type, ...]] = {
    field.name: (bool, type(None)) if field.name == "enabled" else (bool,) if "bool" in str(field.type) else (str,)
    for field in dataclasses.fields(Settings)
}


def option_names() -> list[str]:
    """The keys that `options=` accepts beside Inductor's own."""
    return [OPTION_PREFIX + field.name for field in dataclasses.fields(Settings)]


def snapshot(overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings in force in this thread, with `overrides` (short names) on top.

    Raises:
        TypeError, ValueError: a value has the wrong type, or `expect` a negative count.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)}
    # Environment values of "1" and "0" arrive as booleans, also where a string is meant.
    for name in ("fusions", "arch", "expect", "launch"):
        if isinstance(values[name], bool):
            values[name] = str(int(values[name]))
    values |= overrides or {}
    return Settings(**{**values, "expect": expectation.normalize(values["expect"])})


def split_options(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate our `fusion_passes.*` options, returned with short names, from Inductor's.

    Raises:
        ValueError: an option starts with "fusion_passes." but is not one of ours; the message lists the valid ones.
    """
    own: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    known = {field.name for field in dataclasses.fields(Settings)}
    for key, value in (options or {}).items():
        stem, _, name = key.partition(".")
        if stem.replace("-", "_") == "fusion_passes":
            if name not in known:
                raise ValueError(_unknown(key, name, known))
            own[name] = value
        else:
            inductor[key] = value
    snapshot(own)
    return own, inductor


def named(**own: Any) -> Settings:
    """The settings in force in this thread, with keyword arguments by their short names on top.

    Raises:
        ValueError: an argument is not the name of a setting; the message lists the valid ones as options.
        TypeError: a value has the wrong type.
    """
    return snapshot(split_options({OPTION_PREFIX + name: value for name, value in own.items()})[0])


def _unknown(key: str, name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {OPTION_PREFIX + close[0]!r}?" if close else ""
    return f"unknown option {key!r}.{hint} The options of fusion_passes are: {', '.join(sorted(option_names()))}"
