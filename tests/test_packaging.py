"""What is shipped: a wheel with real files behind the links, its metadata, and a repository that names no machine."""

from __future__ import annotations

import configparser
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusion_passes

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("ops", "patterns")

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel as built from this tree, without touching it: setuptools writes its build folder beside a copy."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools: pip install 'fusion-passes[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "MANIFEST.in", "fusion_passes", *LINKED):
        subprocess.run(["cp", "-a", ROOT / name, source / name], check=True)  # -a keeps the links as links
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", folder, source], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def _metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


@pytest.mark.parametrize("folder", LINKED)
def test_links_in_the_tree_are_relative(folder: str) -> None:
    link = ROOT / "fusion_passes" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"


@pytest.mark.parametrize("folder", LINKED)
def test_linked_folders_are_real_files_in_the_wheel(wheel: zipfile.ZipFile, folder: str) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
    assert expected
    shipped = {entry.removeprefix("fusion_passes/") for entry in wheel.namelist()}
    assert expected <= shipped
    for name in expected:
        assert wheel.read(f"fusion_passes/{name}") == (ROOT / name).read_bytes()


def test_wheel_holds_the_one_package_and_its_data(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fusion_passes"}
    assert "fusion_passes/py.typed" in names
    tables = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("ops/**/*.json")}
    tables |= {path.relative_to(ROOT / "fusion_passes").as_posix() for path in (ROOT / "fusion_passes").glob("*.json")}
    assert {f"fusion_passes/{table}" for table in tables} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = _metadata(wheel, "METADATA")
    assert f"\nVersion: {fusion_passes.__version__}\n" in metadata
    assert "\nName: fusion-passes\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    needed = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert [line for line in needed if "extra ==" not in line] == ["torch>=2.11"]
    assert "Apache License" in _metadata(wheel, "licenses/LICENSE")


def test_wheel_entry_points_resolve(wheel: zipfile.ZipFile) -> None:
    groups = configparser.ConfigParser(delimiters=("=",))
    groups.read_string(_metadata(wheel, "entry_points.txt"))
    assert dict(groups["torch_dynamo_backends"]) == {"fusion_passes": "fusion_passes.backend:fusion_passes_backend"}
    fusions = dict(groups["fusion_passes.fusions"])
    assert fusions["gate_cumsum"] == "fusion_passes.patterns.gate_cumsum:FUSION"
    for target in [*groups["torch_dynamo_backends"].values(), *fusions.values()]:
        module, _, name = target.partition(":")
        assert hasattr(importlib.import_module(module), name), target


def test_version_has_one_source() -> None:
    assert f'"{fusion_passes.__version__}"' not in (ROOT / "pyproject.toml").read_text()


def _repository_texts() -> list[Path]:
    """Every file that is tracked, or would be: not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("needs a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# Spelled in parts, so that this file does not find itself.
TOP_FOLDERS = ["wo" + "rk", "ro" + "ot", "ho" + "me", "tm" + "p"]
MACHINE_PATHS = re.compile(rf"(?<![\w.])/(?:{'|'.join(TOP_FOLDERS)})/\w")
HOSTS = re.compile("|".join([r"py" + r"pi\.org", r"python" + r"hosted\.org", r"download\.py" + r"torch\.org"]))


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, HOSTS], ids=["paths", "hosts"])
def test_repository_names_no_machine(pattern: re.Pattern[str]) -> None:
    texts = _repository_texts()
    assert ROOT / "pyproject.toml" in texts
    found = []
    for path in texts:
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", TOP_FOLDERS)
def test_only_absolute_paths_count_as_machine_paths(folder: str) -> None:
    assert MACHINE_PATHS.search(f"see /{folder}/x")
    assert MACHINE_PATHS.search(f'"/{folder}/x"')
    for harmless in (f"src/{folder}/x", f"https://host/{folder}/x", f"../{folder}/x", f"/{folder} alone"):
        assert not MACHINE_PATHS.search(harmless)


def test_the_package_is_imported_without_triton() -> None:
    """CPU builds of torch bring none: kernels are imported where they are launched."""
    check = "import sys; sys.modules['triton'] = None; import fusion_passes, fusion_passes.ops, fusion_passes.patterns"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
