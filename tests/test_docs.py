"""All Markdown files: every code block runs, commands and links lead somewhere, generated pages are up to date."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fusion_passes import __main__ as cli
from fusion_passes import registry, settings
from tests.support import markdown

ROOT = markdown.ROOT
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs a checkout")

FILES = markdown.files() if (ROOT / "README.md").exists() else []


def generator(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path) -> None:
    """All in one process, and in one test: a fixture would be computed by every worker."""
    programs = [block for name in FILES for block in markdown.blocks(name) if not block.file]
    for block in programs:
        ast.parse(block.code)
    runnable = [block for block in programs if block.mark != "test: gpu" or torch.cuda.is_available()]
    assert len(runnable) > 20
    failed, reports = [], 0
    for block, error, printed in markdown.run(runnable, tmp_path):
        if error:
            failed.append(f"{block.where}:\n{error}")
        if block.mark == "prints the report below" and not torch.cuda.is_available():
            reports += 1
            shown = re.sub(r"\S*/example\.py", "example.py", printed).strip()
            if shown != block.below.strip():
                failed.append(f"{block.where} prints:\n{shown}\n")
    assert not failed, "\n".join(failed)
    assert reports or torch.cuda.is_available()


def test_every_fusion_has_a_page_as_the_generator_writes_it() -> None:
    wanted = generator("generate").pages()
    assert list(wanted) == [f"{name}.md" for name in registry.known()][: len(wanted)] and len(wanted) >= 9
    assert {path.name for path in (DOCS / "fusions").glob("*.md")} == set(wanted)
    for name, text in wanted.items():
        assert (DOCS / "fusions" / name).read_text(encoding="utf-8") == text, (
            f"docs/fusions/{name} is not what its docstrings say: run `make docs`"
        )


def test_launch_parameters_that_no_docstring_describes_are_an_error() -> None:
    described = generator("generate")._described
    doc = "An op.\n\nLaunch parameters:\n    rows: rows of a tile,\n        at most.\n    a, b: others.\n\nNo more.\n"
    found = described(doc, "Launch parameters:\n", ("rows", "a", "b"), "launch parameters of x")
    assert found == {"rows": "rows of a tile, at most.", "a, b": "others."}
    with pytest.raises(ValueError, match="are rows, warps; the docstring describes rows, a, b"):
        described(doc, "Launch parameters:\n", ("rows", "warps"), "launch parameters of x")
    with pytest.raises(ValueError, match="no docstring has a section"):
        described("An op.", "Launch parameters:\n", ("rows",), "launch parameters of x")


def test_docstrings_become_markdown() -> None:
    text = generator("generate").markdown(
        "a * b of `gate_cumsum`, *Words* and `_gate`, x <y>:\n\n    c = a * b\n\n    d = `e`\n\n- f", page="other"
    )
    assert text == (
        "a \\* b of [`gate_cumsum`](gate_cumsum.md), *Words* and [`_gate`](../../patterns/_gate.py), x &lt;y>:\n\n"
        "```text\nc = a * b\n\nd = `e`\n```\n\n- f"
    )


@pytest.mark.skipif(torch.__version__ < "2.13", reason="the pictures are of graphs that torch 2.13 traces")
def test_the_pictures_are_as_they_are_drawn_now() -> None:
    wanted = generator("pictures").pictures()
    assert {path.name for path in (DOCS / "pictures").iterdir()} == set(wanted)
    shown = {link for name in FILES for link in markdown.links(name)}
    for name, text in wanted.items():
        assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == text, f"{name} has changed: run `make docs`"
        assert f"pictures/{name}" in shown
        xml.etree.ElementTree.fromstring(text)


@pytest.mark.parametrize("name", registry.known())
def test_the_example_of_a_page_fuses_and_shows_what_does_not(name: str) -> None:
    (block,) = markdown.blocks(f"docs/fusions/{name}.md")
    assert f'fusion="{name}"' in block.code
    assert "assert_fuses(" in block.code and "assert_refuses(" in block.code


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name: str) -> None:
    assert not list(markdown.broken(name))


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# A `b`, c\n\n## Twice\n\n## Twice\n")
    (tmp_path / "a.md").write_text(
        "[1](b.md) [2](b.md#a-b-c) [3](b.md#twice-1) [4](https://x.y) [5](#no) [6](c.md) [7](b.md#twice-2)\n"
        "![8](d.svg) `[9](e.md)`\n```text\n[10](f.md)\n```\n"
    )
    found = [message.split()[3].rstrip(",") for message in markdown.broken("a.md")]
    assert found == ["#no", "c.md", "b.md#twice-2", "d.svg"]


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, pending = set(), ["README.md"]
    while pending:
        name = pending.pop()
        if name in seen or name not in FILES:
            continue
        seen.add(name)
        targets = [link.partition("#")[0] for link in markdown.links(name) if not re.match(r"[a-z]+:", link)]
        pending += [((ROOT / name).parent / t).resolve().relative_to(ROOT).as_posix() for t in targets if t]
    assert seen == set(FILES)


def test_every_command_that_the_text_names_exists() -> None:
    (commands,) = [action.choices for action in cli._parser()._actions if action.choices]
    assert commands is not None
    lines = 0
    for name in FILES:
        named = set(re.findall(r"python -m fusion_passes (\w+)", markdown.text(name)))
        assert named <= set(commands), name
        for line in re.findall(r"^python -m fusion_passes ([^#\n]+)", markdown.text(name), re.M):
            cli._parser().parse_args(line.split())
            lines += 1
    assert lines > 10


def test_every_make_target_that_the_text_names_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for name in FILES for target in re.findall(r"(?:^|`)make (\w+)", markdown.text(name), re.M)}
    assert named and named <= targets


def test_every_setting_that_the_text_names_exists() -> None:
    words = {word for name in FILES for word in re.findall(r'"fusion_passes\.(\w+)"', markdown.text(name))}
    assert words and words <= set(settings.Settings.__dataclass_fields__)
    variables = {word for name in FILES for word in re.findall(r"\bFUSION_PASSES_(\w+)", markdown.text(name))}
    assert variables <= {name.upper() for name in settings.Settings.__dataclass_fields__}
