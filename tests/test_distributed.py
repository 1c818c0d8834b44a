"""Models split over ranks: every rank finds its sites, with its own heads, and the results are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "support" / "distributed_worker.py"

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")


def on_two_ranks(split: str) -> list[dict[str, Any]]:
    """What each rank found, and how far its result is from that of one process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(WORKER), split]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("split, heads", [("heads", 2), ("parameters", 4)])
def test_every_rank_finds_its_sites(split: str, heads: int) -> None:
    """Tensor parallelism by DTensor gives a rank half of the heads, fully sharded parameters all of them."""
    ranks = on_two_ranks(split)
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for rank in ranks:
        (what,) = rank["what"]
        assert f"{heads} heads x 32 channels" in what
        assert rank["error"] < 1e-6
