"""What to look for: one fusion per module, `FUSIONS` lists them all."""

from __future__ import annotations

from fusion_passes.patterns.gate_cumsum import FUSION as GATE_CUMSUM

FUSIONS = (GATE_CUMSUM,)
