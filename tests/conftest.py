"""Every test starts with a fresh Dynamo, no counters and a compile cache of its own; ops start with memory of NaN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from fusion_passes import eager
from fusion_passes.plans import Output, Program
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
    stock = eager.run

    def run(program: Program, tensors: Mapping[Output, torch.Tensor], args: tuple[Any, ...] = ()) -> None:
        for memory in tensors.values():
            poison(memory)
        stock(program, tensors, args)

    monkeypatch.setattr(eager, "run", run)
