"""Every test starts with a fresh Dynamo, no counters and a compile cache of its own; ops start with memory of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from fusion_passes import eager
from tests.support.programs import poison


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels of an eager call on a GPU leave unwritten is NaN, and not what an earlier call wrote."""
    if request.path.stem == "test_bench":
        return  # times
    stock = eager._empty
    monkeypatch.setattr(eager, "_empty", lambda output, device: poison(stock(output, device)))
