"""The programs under examples/ run at tiny size and say that their results agree."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fusion_passes import transformers as door

FOLDER = Path(__file__).resolve().parents[1] / "examples"

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs a checkout")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_program_is_run_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {"generate", "linear_attention"}


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
    assert "fused chunk_delta_rule 1" in printed and "fell back" not in printed
    assert door.unbind() == []


@pytest.mark.parametrize("name", ["generate", "linear_attention"])
def test_help_says_what_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        example(name).main(["--help"])
    printed = capsys.readouterr().out
    assert "--real" in printed and f"python examples/{name}.py" in printed
