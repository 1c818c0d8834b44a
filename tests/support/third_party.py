"""The package under examples/third_party, loaded from where it is written."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "third_party"


def modules() -> dict[str, ModuleType]:
    """The modules of its two fusions by name; their ops are registered, the fusions are not."""
    found = {}
    for name in ("softcap", "geglu"):
        spec = importlib.util.spec_from_file_location(f"gemma_{name}", SOURCE / "gemma_fusions" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        if spec.name not in sys.modules:
            sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[spec.name])
        found[name] = sys.modules[spec.name]
    return found
