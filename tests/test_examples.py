"""The programs under examples/ run at tiny size and say that their results agree."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from fusion_passes import transformers as door

FOLDER = Path(__file__).resolve().parents[1] / "examples"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs a checkout")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a program that is started by its path, the folder is where its imports are looked up first."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def quick() -> Iterator[None]:
    """Inductor's passes and our lowering as always, but no C++ for other operators: that is minutes of g++."""
    settings: dict[str, Any] = {"fallback_by_default": True} if hasattr(inductor_config, "fallback_by_default") else {}
    with inductor_config.patch(settings):
        yield


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_every_program_is_run_here() -> None:
    assert PROGRAMS == [
        "convolved_qkv", "generate", "latent_attention", "linear_attention", "sparse_attention",
        "tensor_parallel", "training",
    ]  # fmt: skip


@pytest.mark.slow
def test_linear_attention(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("linear_attention").main(["--model", "olmo_hybrid", "--tokens", "20"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("equal to rounding") == 2
    assert printed.count("fused chunk_delta_rule 1") == 2
    assert printed.count("the model calls the op") == 1
    assert "used by 1 layer\n" in printed
    assert door.unbind() == []


@pytest.mark.slow
def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("generate").main(["--model", "olmo_hybrid", "--prompt", "9", "--new", "6"]) == 0
    printed = capsys.readouterr().out
    assert "tokens as without fusion_passes: 100%" in printed
    assert "bound 2 functions to chunk_delta_rule" in printed and "fell back" not in printed
    assert door.unbind() == []


@pytest.mark.parametrize(
    ("name", "arguments", "fused"),
    [
        ("sparse_attention", ["--model", "deepseek_v32", "--tokens", "80"], "head_gate 1, index_score 1"),
        ("sparse_attention", ["--model", "deepseek_v32", "--tokens", "48"], "full_topk 1"),
        ("latent_attention", [], "mla_kv_pack 2"),
        ("convolved_qkv", [], "qkv_split 2"),
    ],
)
def test_models(name: str, arguments: list[str], fused: str, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert example(name).main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("equal to rounding") == 1
    assert f"fused {fused}\n" in printed


def test_a_difference_fails(quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = example("latent_attention")
    monkeypatch.setattr("_compare.compiled", lambda model, device: lambda input: model(1.01 * input))
    assert program.main([]) == 1
    assert "NOT equal" in capsys.readouterr().out


@pytest.mark.slow
def test_training(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    assert example("training").main(["--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "losses equal to rounding" in printed
    assert "fused gate_cumsum 1, qkv_split 1\n" in printed
    assert "saved for the backward pass" in printed
    assert inductor_config.post_grad_custom_pre_pass is None


def test_accelerate_takes_no_name_of_ours() -> None:
    """Why the Trainer needs `enabled()`."""
    accelerate = pytest.importorskip("accelerate", reason="is about accelerate")
    with pytest.raises(ValueError, match="FUSION_PASSES"):
        accelerate.utils.TorchDynamoPlugin(backend="fusion_passes")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")
def test_tensor_parallel(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(FOLDER.parent / "tests" / "support" / "quick_example.py")
    arguments = ["tensor_parallel", "--tokens", "64", "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, script, *arguments], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| 2 | fused | " in done.stdout and "1 key and 1 value heads" in done.stdout
    for rank in json.loads(path.read_text())["ranks"]:
        assert [(row["gpus"], row["compiled"]) for row in rank] == [
            (1, "stock"), (1, "fused"), (2, "stock"), (2, "fused"),
        ]  # fmt: skip
        assert [row["sites"] for row in rank] == [{}, {"chunk_delta_rule": 1}] * 2
        assert max(row["error"] for row in rank) < 1e-5


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        example(name).main(["--help"])
    printed = capsys.readouterr().out
    assert "--real" in printed and f"python examples/{name}.py" in printed
