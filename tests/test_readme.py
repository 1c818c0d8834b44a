"""The tables of README.md are those of the code, and the recipe of CONTRIBUTING.md works; for blocks see test_docs."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
from pathlib import Path

import pytest

import fusion_passes
from fusion_passes import config, registry, settings
from tests.support import markdown

ROOT = markdown.ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs a checkout")

RECIPE = [block for block in markdown.blocks("CONTRIBUTING.md") if block.file]


def test_the_table_of_settings_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(FUSION_PASSES\w*)` \| `(.+?)` \| (.+) \|$", markdown.text("README.md"), re.M)
    entries = {name: config._config[name] for name in (f.name for f in dataclasses.fields(settings.Settings))}  # type: ignore[attr-defined]
    assert [name for name, *_ in rows] == list(entries)
    assert set(entries) == set(config._config)  # type: ignore[attr-defined]
    for name, environment, default, meaning in rows:
        assert default == repr(entries[name].default)
        assert environment == f"FUSION_PASSES_{name.upper()}".removesuffix("_ENABLED")
        # The name is read when the module is imported: it has to be the one in its source.
        assert re.search(rf'^{name}: .*env_name_default="{environment}"', inspect.getsource(config), re.M)
        assert len(meaning) > 20


def test_every_fusion_is_in_the_table() -> None:
    section = markdown.text("README.md").split("## Fusions")[1].split("\n## ")[0]
    assert re.findall(r"^\| \[`(\w+)`\]\(docs/fusions/\1\.md\) \|", section, re.M) == list(registry.known())


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
    done = markdown.python(
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
from fusion_passes.lowering import Operand, Output, Target
from fusion_passes.plans import operand_of
from fusion_passes.ops.quick_gelu import plan, reference
x = torch.randn(3, 1000)
launch = plan(Target(by_name("sm_90"), int), operand_of(x))
out = torch.full_like(x, float("nan"))
values = {k: x if isinstance(v, Operand) else out if isinstance(v, Output) else v for k, v in launch.args.items()}
launch.kernel[launch.grid](**values, num_warps=launch.num_warps)
torch.testing.assert_close(out, reference(x))
"""


def test_the_recipes_kernel_computes_its_reference(contributed: Path) -> None:
    pytest.importorskip("triton")
    done = markdown.python("-c", KERNEL, cwd=contributed, PYTHONPATH=str(contributed), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_copy_did_not_reach_this_process() -> None:
    assert "quick_gelu" not in registry.known()
