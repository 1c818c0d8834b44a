"""The compile caches: hits where nothing changed, misses after any change that could matter, reports from both."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fusion_passes
from fusion_passes import fingerprint, registry
from fusion_passes.graph_pass import FusionPass
from fusion_passes.settings import snapshot

ROOT = Path(fusion_passes.__file__).parent

PROGRAM = """
import json, sys, torch, fusion_passes
from torch._dynamo.utils import counters
from gates import gate, inputs
options = json.loads(sys.argv[1])
out = torch.compile(gate, backend="fusion_passes", options=options, fullgraph=True)(*inputs())
torch.testing.assert_close(out, gate(*inputs()))
print(json.dumps({
    "hits": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
    "report": json.loads(fusion_passes.report().to_json()),
}))
"""

OPTIONS = {"fusion_passes.reference_on_cpu": True}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package that a test may edit, beside the small model."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT, folder / "fusion_passes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).parent / "gates.py", folder)
    run(folder, OPTIONS)
    return folder


def run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Compile the gate in a new process whose caches live in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", PROGRAM, json.dumps(options)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_unchanged_settings_hit_and_the_warm_report_equals_the_cold_one(copy: Path, tmp_path: Path) -> None:
    cold = json.loads(json.dumps(run(_fresh(copy, tmp_path), OPTIONS)))
    warm = run(tmp_path, OPTIONS)
    assert cold["hits"] == 0 and warm["hits"] > 0
    assert warm["report"] == cold["report"]
    assert warm["report"]["counts"] == {"gate_cumsum": 1}
    assert warm["report"]["fused"][0]["source"].endswith("gates.py:17")


@pytest.mark.parametrize(
    "edited",
    ["fusion_passes/ops/gate_cumsum.py", "fusion_passes/patterns/gate_cumsum.py", "fusion_passes/graph_pass.py"],
)
def test_an_edited_source_misses(copy: Path, edited: str) -> None:
    assert run(copy, OPTIONS)["hits"] > 0
    with (copy / edited).open("a") as file:
        file.write("\n# edited\n")
    assert run(copy, OPTIONS)["hits"] == 0


def test_an_edited_table_misses(copy: Path) -> None:
    tables = [path for path in fingerprint.source_files(copy / "fusion_passes") if path.suffix == ".json"]
    assert tables
    assert run(copy, OPTIONS)["hits"] > 0
    tables[0].write_text(json.dumps(json.loads(tables[0].read_text()), indent=7))
    assert run(copy, OPTIONS)["hits"] == 0


@pytest.mark.parametrize(
    "option", [{"fusion_passes.verify": True}, {"fusion_passes.fusions": "gate_cumsum"}, {"fusion_passes.launch": " "}]
)
def test_another_setting_misses(copy: Path, option: dict[str, Any]) -> None:
    assert run(copy, OPTIONS)["hits"] > 0
    assert run(copy, {**OPTIONS, **option})["hits"] == 0


def test_fingerprint_covers_every_source_file_through_the_symlinks(tmp_path: Path) -> None:
    names = {str(path.relative_to(ROOT)) for path in fingerprint.source_files(ROOT)}
    assert {"ops/gate_cumsum.py", "patterns/gate_cumsum.py", "graph_pass.py"} <= names
    target = tmp_path / "target"
    target.mkdir()
    (target / "kernel.py").write_text("1")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "ops").symlink_to(target)
    before = fingerprint.hash_files(tmp_path / "package")
    (target / "kernel.py").write_text("2")
    assert fingerprint.hash_files(tmp_path / "package") != before


def test_every_setting_is_part_of_the_fingerprint() -> None:
    settings = snapshot()
    fusions = registry.select("default")
    base = fingerprint.fingerprint(settings, fusions)
    assert fingerprint.fingerprint(snapshot(), registry.select("default")) == base
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        other: dict[str, Any] = {field.name: "none" if isinstance(value, str) else not value}
        assert fingerprint.fingerprint(dataclasses.replace(settings, **other), fusions) != base
    assert fingerprint.fingerprint(settings, []) != base


def test_the_code_of_other_packages_fusions_is_part_of_the_fingerprint() -> None:
    fusion = registry.known()["gate_cumsum"]
    foreign = dataclasses.replace(fusion, match=lambda anchor, context: None)
    assert fingerprint.fingerprint(snapshot(), [foreign]) != fingerprint.fingerprint(snapshot(), [fusion])


def test_uuid_is_stable_within_a_process() -> None:
    assert FusionPass(snapshot()).uuid() == FusionPass(snapshot()).uuid()


def _fresh(copy: Path, folder: Path) -> Path:
    shutil.copytree(copy / "fusion_passes", folder / "fusion_passes")
    shutil.copy(copy / "gates.py", folder)
    return folder
