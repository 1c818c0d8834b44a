"""README.md and CONTRIBUTING.md: every code block runs, tables and commands are those of the code, the recipe works."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusion_passes
from fusion_passes import __main__ as cli
from fusion_passes import config, registry, settings

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs a checkout")

BLOCK = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
FILE = re.compile(r"# (\S+/\S+\.py)\n")


@dataclasses.dataclass(frozen=True)
class Block:
    """A ```python block, the comment just before it, and the file that its first line names."""

    where: str
    code: str
    mark: str
    file: str


def blocks(name: str) -> list[Block]:
    path = ROOT / name
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = []
    for match in BLOCK.finditer(text):
        file = FILE.match(match["code"])
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(f"{name}:{line}", match["code"], match["mark"] or "", file[1] if file else ""))
    return found


README, RECIPE = blocks("README.md"), [b for b in blocks("CONTRIBUTING.md") if b.file]
PROGRAMS = README + [b for b in blocks("CONTRIBUTING.md") if not b.file]


def python(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


# Runs every file named on the command line as a program of its own, in one process to import torch once.
RUNNER = """
import contextlib, io, json, runpy, sys, traceback, torch
results = {}
for path in sys.argv[1:]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    printed, error = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            error = traceback.format_exc()
    results[path] = [error, printed.getvalue()]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Error ("" for none) and standard output of every block, by the place of the block."""
    folder = tmp_path_factory.mktemp("blocks")
    paths = {}
    for i, block in enumerate(PROGRAMS):
        if block.mark != "test: gpu" or torch.cuda.is_available():
            path = folder / str(i) / "example.py"
            path.parent.mkdir()
            path.write_text(block.code)
            paths[block.where] = str(path)
    done = python("-c", RUNNER, *paths.values(), cwd=folder, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {where: (found[path][0], found[path][1]) for where, path in paths.items()}


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda b: b.where)
def test_block_runs(block: Block, results: dict[str, tuple[str, str]]) -> None:
    if block.where not in results:
        ast.parse(block.code)
        pytest.skip("needs a GPU")
    error, printed = results[block.where]
    assert not error, f"{block.where}:\n{error}"
    if block.mark == "prints the report below" and not torch.cuda.is_available():
        (shown,) = re.findall(r"^```text\n(fusion_passes: .*?)^```$", _text("README.md"), re.M | re.S)
        assert re.sub(r"\S*/example\.py", "example.py", printed).strip() == shown.strip()


def test_there_are_blocks_to_run() -> None:
    assert len(README) >= 5 and any(b.mark == "prints the report below" for b in README)
    assert len(RECIPE) == 4


def test_the_table_of_settings_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(FUSION_PASSES\w*)` \| `(.+?)` \| (.+) \|$", _text("README.md"), re.M)
    entries = {name: config._config[name] for name in (f.name for f in dataclasses.fields(settings.Settings))}  # type: ignore[attr-defined]
    assert [name for name, *_ in rows] == list(entries)
    assert set(entries) == set(config._config)  # type: ignore[attr-defined]
    for name, environment, default, meaning in rows:
        assert default == repr(entries[name].default)
        assert environment == f"FUSION_PASSES_{name.upper()}".removesuffix("_ENABLED")
        # The name is read when the module is imported: it has to be the one in its source.
        assert re.search(rf'^{name}: .*env_name_default="{environment}"', inspect.getsource(config), re.M)
        assert len(meaning) > 20


def test_every_setting_that_the_text_names_exists() -> None:
    words = set(re.findall(r'"fusion_passes\.(\w+)"', _text("README.md")))
    assert words and words <= {f.name for f in dataclasses.fields(settings.Settings)}


def test_every_command_that_the_text_names_exists() -> None:
    named = set(re.findall(r"python -m fusion_passes (\w+)", _text("README.md") + _text("CONTRIBUTING.md")))
    (commands,) = [a.choices for a in cli._parser()._actions if a.choices]
    assert commands is not None and named and named <= set(commands)
    for line in re.findall(r"^python -m fusion_passes ([^#\n]+)", _text("README.md"), re.M):
        cli._parser().parse_args(line.split())


def test_every_make_target_that_the_text_names_exists() -> None:
    named = set(re.findall(r"(?:^|`)make (\w+)", _text("README.md") + _text("CONTRIBUTING.md"), re.M))
    targets = set(re.findall(r"^(\w+):", _text("Makefile"), re.M))
    assert named and named <= targets


def test_every_fusion_is_in_the_table() -> None:
    section = _text("README.md").split("## Fusions")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == list(registry.known())


def test_links_lead_to_files() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        prose = re.sub(r"^```.*?^```$", "", _text(name), flags=re.M | re.S)
        for target in re.findall(r"\]\((?!http)([^)#]+)", prose):
            assert (ROOT / target).exists(), f"{name} links to {target}"


@pytest.fixture(scope="module")
def contributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the recipe's four files and the lines that make them known."""
    copy = tmp_path_factory.mktemp("contributed")
    package = copy / "fusion_passes"
    shutil.copytree(Path(fusion_passes.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for block in RECIPE:
        path = copy / block.file if block.file.startswith("tests/") else package / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code)
    with (package / "ops" / "__init__.py").open("a") as file:
        file.write("\nfrom fusion_passes.ops import quick_gelu  # noqa\n")
    with (package / "patterns" / "__init__.py").open("a") as file:
        file.write("\nfrom fusion_passes.patterns.quick_gelu import FUSION  # noqa\n\nFUSIONS = (*FUSIONS, FUSION)\n")
    return copy


def test_the_recipe_is_four_files_under_one_stem() -> None:
    stem = "quick_gelu"
    folders = ("ops", "patterns")
    wanted = [f"{folder}/{stem}.py" for folder in folders]
    assert [b.file for b in RECIPE] == wanted + [f"tests/{folder}/test_{stem}.py" for folder in folders]


def test_the_recipe_passes_its_own_tests(contributed: Path) -> None:
    arguments = ("-q", "--import-mode=importlib", "--show-capture=no", "-p", "no:cacheprovider", "tests")
    (contributed / "tests" / "test_compiled.py").write_text(COMPILED)
    cache = str(contributed / "cache")
    done = python(
        "-m", "pytest", *arguments, cwd=contributed, PYTHONPATH=str(contributed), TORCHINDUCTOR_CACHE_DIR=cache
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"(\d\d) passed", done.stdout) and "skipped" not in done.stdout


# One more test for the copy: a compile with code generation, and the command line.
COMPILED = '''
import re, torch, fusion_passes
from fusion_passes.__main__ import main

def test_compiled_and_listed(capsys):
    torch._dynamo.utils.counters.clear()
    f = lambda x: x * torch.sigmoid(1.702 * x)
    x, options = torch.randn(8, 8), {"fusion_passes.reference_on_cpu": True, "fusion_passes.strict": True}
    torch.testing.assert_close(torch.compile(f, backend="fusion_passes", options=options)(x), f(x))
    assert fusion_passes.report().counts == {"quick_gelu": 1}, fusion_passes.report()
    assert main(["list"]) == 0 and re.search("^on +quick_gelu", capsys.readouterr().out, re.M)
'''


KERNEL = """
import torch
from fusion_passes.arch import by_name
from fusion_passes.lowering import Operand, Output, Target, _operand
from fusion_passes.ops.quick_gelu import plan, reference
x = torch.randn(3, 1000)
launch = plan(Target(by_name("sm_90"), int), _operand(x))
out = torch.full_like(x, float("nan"))
values = {k: x if isinstance(v, Operand) else out if isinstance(v, Output) else v for k, v in launch.args.items()}
launch.kernel[launch.grid](**values, num_warps=launch.num_warps)
torch.testing.assert_close(out, reference(x))
"""


def test_the_recipes_kernel_computes_its_reference(contributed: Path) -> None:
    pytest.importorskip("triton")
    done = python("-c", KERNEL, cwd=contributed, PYTHONPATH=str(contributed), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_copy_did_not_reach_this_process() -> None:
    assert "quick_gelu" not in registry.known()


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")
