"""The Markdown files of the repository: their code blocks, how these are run, and what their links lead to."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

BLOCK = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
FILE = re.compile(r"# (\S+/\S+\.py)\n")


def files() -> list[str]:
    """README.md, the pages and the examples; CONTRIBUTING.md last, for it registers a fusion."""
    found = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    return ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted(found)), "CONTRIBUTING.md"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Block:
    """A ```python block.

    Attributes:
        where: file and line.
        code: what is to be run.
        mark: the comment just before it: "test: gpu", or "prints the report below".
        file: the file that its first line names; such blocks are parts of a recipe.
        below: the text block that follows.
    """

    where: str
    code: str
    mark: str
    file: str
    below: str


def blocks(name: str) -> list[Block]:
    whole = text(name) if (ROOT / name).exists() else ""
    found = []
    for match in BLOCK.finditer(whole):
        file = FILE.match(match["code"])
        line = whole.count("\n", 0, match.start("code"))
        below = re.match(r"\s*^```text\n(.*?)^```$", whole[match.end() :], re.M | re.S)
        shown = below[1] if below else ""
        found.append(Block(f"{name}:{line}", match["code"], match["mark"] or "", file[1] if file else "", shown))
    return found


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
    torch.manual_seed(0)
    printed, error = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            error = traceback.format_exc()
    results[path] = [error, printed.getvalue()]
print(json.dumps(results))
"""


def run(programs: Iterable[Block], folder: Path) -> Iterator[tuple[Block, str, str]]:
    """Every block as a file `example.py` of its own, with its error ("" for none) and what it printed."""
    paths = {}
    for i, block in enumerate(programs):
        path = folder / str(i) / "example.py"
        path.parent.mkdir()
        path.write_text(block.code)
        paths[str(path)] = block
    done = python("-c", RUNNER, *paths, cwd=folder, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    for path, (error, printed) in json.loads(done.stdout.splitlines()[-1]).items():
        yield paths[path], error, printed


def links(name: str) -> list[str]:
    """The targets of the links and pictures of a file."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text(name)))
    return re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)


def anchors(name: str) -> set[str]:
    """The anchors of a file's headings, as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?)\s*$", FENCE.sub("", text(name)), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def broken(name: str) -> Iterator[str]:
    """Relative links of a file that lead nowhere."""
    for link in links(name):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        if not path.exists():
            yield f"{name} links to {target}, which does not exist"
        elif anchor and anchor not in anchors(path.resolve().relative_to(ROOT).as_posix()):
            yield f"{name} links to {link}, and no heading has that anchor"
