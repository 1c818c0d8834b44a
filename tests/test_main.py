"""The command line, in this process; what needs a compile runs a small stand-in for the Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fusion_passes
from fusion_passes import config, demo, hf_models, registry
from fusion_passes.__main__ import main
from tests import gates

# Installed on the module when it is imported, where type checkers cannot see it.
patched: Any = config.patch

TARGET = """
import torch

def build():
    def f(raw, a_log):
        gate = -a_log.exp()[:, None] * torch.nn.functional.softplus(raw)
        return gate.unflatten(1, (-1, 16)).cumsum(2)
    return f, [torch.randn(1, 64, 2, 8), torch.rand(2)]
"""


class Output(NamedTuple):
    last_hidden_state: torch.Tensor


class Model(torch.nn.Module):
    """Takes tokens, has a parameter and returns an object with `last_hidden_state`, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        raw, self.a_log, self.bias = gates.inputs(tokens=128)
        self.raw = torch.nn.Parameter(raw, requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> Output:
        return Output(gates.gate(self.raw, self.a_log, self.bias))


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / "my_model.py"
    path.write_text(TARGET)
    return f"{path}:build"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["on", name] for name in registry.known()]
    with patched(fusions="none"):
        assert main(["list"]) == 0
    assert all(line.startswith("off ") for line in capsys.readouterr().out.splitlines())


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    with patched(verify=True):
        assert main(["env"]) == 0
    rows = {line.split()[0]: line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()}
    assert rows["torch"] == torch.__version__ and rows["fusion_passes"] == fusion_passes.__version__
    assert rows["verify"].split() == ["True", "default", "False"]
    assert set(config._config) <= set(rows)  # type: ignore[attr-defined]
    assert {"python", "triton", "transformers", "GPU"} <= set(rows)


def test_explain_a_function_of_a_file(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", target]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fusion_passes: fused gate_cumsum 1") and "my_model.py:7" in out
    assert "chunks of 16" in out


def test_explain_as_json(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", target, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["counts"] == {"gate_cumsum": 1} and data["fused"][0]["source"].endswith("my_model.py:7")


def test_explain_writes_a_page(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert main(["explain", target, "--html", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>") and "my_model.py:7" in page.read_text()


def test_explain_with_other_settings(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", target, "--fusions", "default,-gate_cumsum", "--arch", "sm_80"]) == 0
    out = capsys.readouterr().out
    assert "no candidate" in out
    assert torch.cuda.is_available() or "NVIDIA A100 (sm_80)" in out
    assert config.fusions == "default"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no_such_model"], "neither one of .*kimi_linear.* nor an existing FILE.py:FUNCTION"),
        (["missing.py:build"], "'missing.py:build' is neither"),
        (["TARGET:forge"], "has no function 'forge'"),
        (["TARGET:build", "--arch", "sm_12"], "unknown architecture 'sm_12': it must be one of .*gfx942.*sm_90"),
        (["TARGET:build", "--fusions", "gate"], "unknown fusion 'gate'.*gate_cumsum"),
        (["kimi_linear", "--layers", "1"], "kimi_linear cannot be built: kimi_linear needs layers >= 2"),
    ],
)
def test_explain_names_what_is_wrong(arguments: list[str], message: str, target: str) -> None:
    path = target.removesuffix(":build")
    with pytest.raises(SystemExit, match=message):
        main(["explain", *(word.replace("TARGET", path) for word in arguments)])


def test_explain_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", minversion="5.17")
    assert main(["explain", "qwen3_next", "--seq", "8", "--json", "--dtype", "bf16"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["counts"] == {"chunk_delta_rule": 1}
    assert "modeling_qwen3_next.py" in data["fused"][0]["source"]


def stand_in(monkeypatch: pytest.MonkeyPatch, model: Model) -> list[dict[str, Any]]:
    """Have the demo build `model`; returns the arguments that it was asked with."""
    asked: list[dict[str, Any]] = []

    def build(name: str, **arguments: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        asked.append({"name": name, **arguments})
        ids = torch.zeros(arguments["batch"], arguments["seq"], dtype=torch.int64)
        return model.to(arguments["device"]), {"input_ids": ids}

    monkeypatch.setattr(hf_models, "build", build)
    return asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is made for CPU")
def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = stand_in(monkeypatch, Model())
    assert main(["demo", "--seq", "3", "--layers", "4", "--dtype", "fp32"]) == 0
    assert asked[0] == {
        "name": "kimi_linear", "dtype": torch.float32, "layers": 4, "seq": 3, "batch": 1, "device": "cpu"
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "kimi_linear: 1 x 3 tokens, torch.float32, on cpu" in out
    assert "fused gate_cumsum 1" in out and out.rstrip().endswith("equal to rounding")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is made for CPU")
def test_demo_fails_where_the_results_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, Model())
    monkeypatch.setitem(demo.TOLERANCE, torch.float32, -1.0)
    assert main(["demo"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("NOT equal")


def test_demo_says_what_it_cannot_build() -> None:
    with pytest.raises(SystemExit, match="needs layers >= 2"):
        main(["demo", "--layers", "1"])


@pytest.mark.parametrize("arguments", [[], ["explode"], ["demo", "--model", "x"], ["explain", "x", "--dtype", "int8"]])
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and "usage: python -m fusion_passes" in capsys.readouterr().err
