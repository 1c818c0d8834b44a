"""Fused ops: importing this package registers them all in `torch.ops.fusion_passes`."""

from __future__ import annotations

from fusion_passes.ops import gate_cumsum

__all__ = ["gate_cumsum"]
