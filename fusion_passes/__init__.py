"""Fused kernels for any compiled model: `torch.compile(model, backend="fusion_passes")`.

Public names: `options`, `enabled`, `apply` (doors), `config` (settings), `explain`, `report`, `Report` (what was and
was not fused), `ExpectationError`, `Fusion`, `register` (extension).
"""

from __future__ import annotations

import torch

__version__ = "0.1.0"


def _require_torch(version: str = torch.__version__) -> None:
    major, minor = (int(part) for part in version.split("+")[0].split(".")[:2])
    if (major, minor) < (2, 11):
        raise ImportError(f"fusion_passes needs torch 2.11 or newer, found {version}: pip install 'torch>=2.11'")


_require_torch()

from fusion_passes import config  # noqa: E402
from fusion_passes.backend import enabled, install, options  # noqa: E402
from fusion_passes.expectation import ExpectationError  # noqa: E402
from fusion_passes.explanation import explain  # noqa: E402
from fusion_passes.exported import apply  # noqa: E402
from fusion_passes.fusion import Fusion  # noqa: E402
from fusion_passes.registry import register  # noqa: E402
from fusion_passes.reports import Report, report  # noqa: E402

if config.enabled:
    install()

__all__ = [
    "ExpectationError",
    "Fusion",
    "Report",
    "apply",
    "config",
    "enabled",
    "explain",
    "options",
    "register",
    "report",
]
