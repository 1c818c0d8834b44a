"""What torch 2.11, the oldest that is supported, does otherwise than the torch the tests are written for."""

from __future__ import annotations

import pytest
import torch


def not_on_2_11(why: str, when: bool = True) -> None:
    """Skip the calling test there."""
    if when and torch.__version__.startswith("2.11."):
        pytest.skip(f"torch 2.11 {why}")
