"""A model split over two GPUs: every rank finds its sites, with its own heads, and the results are those of one GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tensor_parallel.py"
# NVLink multicast can put GPUs that others share out of service.
WITHOUT_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
}  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("model", "split", "tokens", "sites", "heads"),
    [
        ("kimi_linear", "heads", 64, {"chunk_delta_rule": 1}, "1 key and 1 value heads"),
        ("kimi_linear", "parameters", 64, {"chunk_delta_rule": 1}, "2 key and 2 value heads"),
        ("deepseek_v32", "heads", 128, {"head_gate": 2, "index_score": 2}, "8 heads"),
    ],
)
def test_models_of_two_ranks(
    model: str, split: str, tokens: int, sites: dict[str, int], heads: str, tmp_path: Path
) -> None:
    """Linear attention has half of its heads on a rank, the indexer of sparse attention all of them."""
    path = tmp_path / "found.json"
    command = [sys.executable, str(EXAMPLE), "--model", model, "--split", split, "--tokens", str(tokens)]
    command += ["--without-stock", "--json", str(path)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **WITHOUT_MULTICAST, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ranks: list[list[dict[str, Any]]] = json.loads(path.read_text())["ranks"]
    assert len(ranks) == 2
    for rank in ranks:
        alone, split_up = rank
        assert [(found["gpus"], found["compiled"]) for found in rank] == [(1, "fused"), (2, "fused")]
        assert split_up["sites"].items() >= sites.items()
        assert any(heads in what for what in split_up["what"]), split_up["what"]
        assert max(alone["error"], split_up["error"]) < 3e-2
