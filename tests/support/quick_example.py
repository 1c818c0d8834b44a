"""Runs a program of examples/ under torchrun on CPUs, without C++ for what is not ours: that is minutes of g++."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from torch._inductor import config

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    if hasattr(config, "fallback_by_default"):
        config.fallback_by_default = True
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
