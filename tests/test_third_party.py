"""examples/third_party, installed as a package of its own: found without an import, listed, refused with reasons."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fusion_passes
from fusion_passes import fingerprint, registry
from fusion_passes.fusion import Fusion
from fusion_passes.testing import assert_fuses, assert_op, assert_refuses
from tests.support import third_party
from tests.support.third_party import SOURCE

pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason="needs a checkout")

PROGRAM = """
import json, runpy, sys, torch
x, y = torch.randn(4, 16) * 40, torch.randn(4, 16)

def f(x, y):
    product = x @ x.mT
    return 30 * torch.tanh(product / 30) @ y, (y @ y.mT) * torch.nn.functional.gelu(product, approximate="tanh")

options = {"fusion_passes.reference_on_cpu": True, "fusion_passes.strict": True}
assert "fusion_passes" not in sys.modules and "gemma_fusions" not in sys.modules
for actual, expected in zip(torch.compile(f, backend="fusion_passes", options=options)(x, y), f(x, y)):
    torch.testing.assert_close(actual, expected)
import fusion_passes
reports = [fusion_passes.report(), fusion_passes.explain(lambda x: 30 * torch.tanh(x / 29), x)]
print(json.dumps([json.loads(report.to_json()) for report in reports]))
sys.argv = ["fusion_passes", "list"]
runpy.run_module("fusion_passes", run_name="__main__")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example installed by pip, and one more package whose entry point leads nowhere."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools: pip install 'fusion-passes[test]'")
    folder = tmp_path_factory.mktemp("third_party")
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--target", folder / "site", folder / "source"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    broken = folder / "site" / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[fusion_passes.fusions]\nbroken = package_that_is_not_there:FUSION\n")
    return folder / "site"


@pytest.fixture(scope="module")
def done(site: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The program, run in a process of its own that has the two packages installed."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(site), str(Path(fusion_passes.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "program.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_an_installed_package_is_found_without_an_import(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    compiled, explained = json.loads(done.stdout.splitlines()[0])
    assert compiled["counts"] == {"geglu": 1, "softcap": 1} and explained["counts"] == {}
    reasons = {record["fusion"]: record["reason"] for record in explained["near_misses"]}
    assert reasons["softcap"] == "it tends to 30 but is not 30 * tanh(x / 30)"


def test_a_package_that_cannot_be_loaded_is_named_and_stops_nothing(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0
    assert "entry point broken = package_that_is_not_there:FUSION" in done.stderr
    assert "is ignored: No module named 'package_that_is_not_there'" in done.stderr


def test_the_command_line_lists_what_is_installed_and_what_is_broken(done: subprocess.CompletedProcess[str]) -> None:
    lines = {line.split()[1]: line for line in done.stdout.splitlines()[1:]}
    assert lines["geglu"].startswith("on ") and lines["softcap"].endswith("the logits of Gemma 2")
    assert lines["broken"].startswith("-- ") and "No module named 'package_that_is_not_there'" in lines["broken"]
    assert set(lines) == {*registry.known(), "geglu", "softcap", "broken"}


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    return third_party.modules()


@pytest.fixture
def known(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> dict[str, Fusion]:
    """The two fusions, known for the time of one test."""
    fusions = {name: module.FUSION for name, module in modules.items()}
    monkeypatch.setattr(registry, "_fusions", {**registry.known(), **fusions})
    return fusions


X = torch.linspace(-90, 90, 8 * 16).view(8, 16)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 30 * torch.tanh(x / 30),
        lambda x: torch.tanh(x * (1 / 50)) * 50.0,
        lambda x: (torch.tanh(x.flatten() / 2.5) * 2.5).view_as(x),
        lambda x: 30 * torch.tanh((x @ x.mT) / 30) + 1,
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_softcap_in_other_words(known: Any, function: Any, dynamic: bool) -> None:
    assert_fuses(function, X, fusion="softcap", fusions="softcap", dynamic=dynamic)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x: 30 * torch.tanh(x / 29), "it tends to 30 but is not"),
        (lambda x: x * torch.tanh(x / 30), "positive cap"),
        (lambda x: -30 * torch.tanh(x / 30), "positive cap"),
        (lambda x: torch.tanh(x / 30), "not multiplied"),
        (lambda x: 30 * torch.tanh(x / 30 + x @ x.mT @ x), "2 tensors"),
        (lambda x: 30 * torch.tanh((x + 1e-3) / 30), "it tends to 30 but is not"),
        (lambda x: 30 * torch.tanh(torch.clamp(x, max=100) / 30), ""),
        (lambda x: 30 * torch.tanh(x.flip(1) / 30), "element by element"),
        (lambda x: 30 * torch.tanh(x.mT.contiguous().mT / 30), ""),
        (lambda x: 30 * torch.tanh(x[:, ::2] / 30), "contiguous memory"),
    ],
)
def test_what_softcap_is_not(known: Any, function: Any, reason: str) -> None:
    assert_refuses(function, X, fusion="softcap", fusions="softcap", reason=reason)


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x: torch.nn.functional.gelu(x, approximate="tanh") * x[:1], "does not broadcast"),
        (lambda x: torch.nn.functional.gelu(x[:, ::2], approximate="tanh") * x[:, 8:], "contiguous memory"),
    ],
)
def test_what_the_kernel_of_geglu_cannot_serve(known: Any, function: Any, reason: str) -> None:
    assert_refuses(function, X, fusion="geglu", fusions="geglu", reason=reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_ops(modules: dict[str, ModuleType], dtype: torch.dtype) -> None:
    x = torch.linspace(-200, 200, 1001).to(dtype)
    assert_op(modules["softcap"].OP, x, 30.0, exact=modules["softcap"].reference)
    assert_op(modules["geglu"].OP, x, torch.sin(x))


def test_bad_arguments(modules: dict[str, ModuleType]) -> None:
    with pytest.raises(ValueError, match="cap must be positive and finite, got -1"):
        modules["softcap"].OP(X, -1.0)
    with pytest.raises(ValueError, match="x must be contiguous"):
        modules["softcap"].OP(X.mT, 1.0)
    with pytest.raises(ValueError, match="gate and up must have one shape"):
        modules["geglu"].OP(X, X[:1])
    with pytest.raises(ValueError, match="gate and up must be contiguous"):
        modules["geglu"].OP(X.mT, X.mT)


@pytest.mark.parametrize("name", ["softcap", "geglu"])
def test_an_edit_anywhere_in_the_package_changes_the_cache_key(
    known: dict[str, Fusion], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hashed: list[Path] = []

    def hash_files(folder: Path) -> str:
        hashed.append(folder)
        return "digest"

    monkeypatch.setattr(fingerprint, "hash_files", hash_files)
    monkeypatch.setattr(fingerprint, "_hashes", {})
    assert "digest" in fingerprint._module_hash(known[name])
    assert hashed == [SOURCE / "gemma_fusions"]
