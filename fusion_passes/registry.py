"""The fusions this process knows: registered by call or found through the `fusion_passes.fusions` entry points."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import threading

from fusion_passes.fusion import Fusion

log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "fusion_passes.fusions"

_lock = threading.Lock()
_fusions: dict[str, Fusion] = {}
_broken: dict[str, str] = {}
_loaded = False


def register(fusion: Fusion) -> Fusion:
    """Make a fusion known under its name, and return it.

    Registering the same object again does nothing.

    Raises:
        TypeError: `fusion` is not a `Fusion`.
        ValueError: another fusion has that name.
    """
    if not isinstance(fusion, Fusion):
        raise TypeError(f"register() takes a fusion_passes.Fusion, got {type(fusion).__name__}")
    with _lock:
        known = _fusions.get(fusion.name)
        if known is not None and known is not fusion:
            raise ValueError(f"a fusion named {fusion.name!r} is already registered; choose another name")
        _fusions[fusion.name] = fusion
    return fusion


def known() -> dict[str, Fusion]:
    """All fusions by name: our own first, then other packages' in the order of their names."""
    global _loaded
    if not _loaded:
        _load_ours()
        _load_entry_points()
        _loaded = True
    return dict(_fusions)


def broken() -> dict[str, str]:
    """The entry points that could not be loaded, by name, and why."""
    known()
    return dict(_broken)


def _load_ours() -> None:
    from fusion_passes import patterns

    for fusion in patterns.FUSIONS:
        register(fusion)


def _load_entry_points() -> None:
    # A package that cannot be loaded must not take everybody's compile down with it.
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        try:
            loaded = entry.load()
            if isinstance(loaded, Fusion):
                register(loaded)
            else:
                raise TypeError(f"it names a {type(loaded).__name__}, not a fusion_passes.Fusion")
        except Exception as error:
            _broken[entry.name] = f"{entry.value}: {type(error).__name__}: {error}"
            log.warning("entry point %s = %s of group %s is ignored: %s", entry.name, entry.value, entry.group, error)


def select(spec: str) -> list[Fusion]:
    """The fusions that a `fusions` setting names, larger ones before those that they absorb.

    `spec` is a comma-separated list of "default", "all", "none", names, and "-name" to leave one out; later
    entries act on what the earlier ones chose.

    Raises:
        ValueError: an entry names no known fusion; the message lists those that exist.
    """
    fusions = known()
    chosen: dict[str, Fusion] = {}
    for word in (w.strip() for w in spec.split(",") if w.strip()):
        name = word.lstrip("-")
        if name in ("default", "all", "none"):
            group = {} if name == "none" else {n: f for n, f in fusions.items() if name == "all" or f.default}
        elif name in fusions:
            group = {name: fusions[name]}
        else:
            close = difflib.get_close_matches(name, fusions, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"unknown fusion {name!r} in fusions={spec!r}.{hint} Known: {', '.join(fusions)}; "
                "also 'default', 'all', 'none', and '-name' to leave one out"
            )
        if word.startswith("-"):
            chosen = {n: f for n, f in chosen.items() if n not in group}
        elif name == "none":
            chosen = {}
        else:
            chosen.update(group)
    return _absorbers_first(list(chosen.values()))


def _absorbers_first(fusions: list[Fusion]) -> list[Fusion]:
    """A stable order in which a fusion comes before every fusion that it absorbs."""
    ordered: list[Fusion] = []
    pending = list(fusions)
    while pending:
        ready = [f for f in pending if not any(f.name in other.absorbs for other in pending if other is not f)]
        ordered += ready or pending
        pending = [f for f in pending if f not in ordered]
    return ordered
