"""Writes docs/fusions: one page per fusion, from the docstrings of its pattern, its op and the op's function.

    python docs/generate.py

Beside docstrings a page takes the example from docs/examples, launch parameters from the tuned table, and the result
files that hold figures. A docstring is prose, formulas and tables in blocks that are indented by four, and sections:
those of a pattern are `SECTIONS`; an op has `Launch parameters:` and `Shape classes:`, functions have those of Google.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch

from fusion_passes import ops, patterns, registry, tuning
from fusion_passes.bench import cases
from fusion_passes.fusion import Fusion, dtype_name

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
FOLDER = DOCS / "fusions"
NOTE = "<!-- Written by docs/generate.py from docstrings: change those, and run it again. -->"

# Sections of a pattern's docstring, and what stands above them on the page. A `None` goes without a heading.
SECTIONS = {
    "Near misses": "Something else",
    "Refused": "The same, but not to be replaced",
    "Not worth it": "The same, but not worth it",
    "Gains": None,
}
NEAR_MISS = "A near miss in the report. Where the search ends there, the graph stays as it is:"
REFUSED = "Refused in the report, with the reason:"
WORTH = "Refused as well, unless the setting `always_profitable` is on:"
EVERY = (
    "What holds for every fusion, such as devices, dtypes, and writes between a read and its use, is told in\n"
    "[How matching works](../matching.md#7-is-it-legal-and-does-it-pay)."
)

# The op of a fusion has its name, with these exceptions; a second op of a module is listed with its schema.
OPS = {"redundant_copy": "rotate_pairs", "full_topk": None}
MOST_DTYPES = 12


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """The text of every page by the name of its file."""
    ours = {fusion.name: fusion for fusion in patterns.FUSIONS}
    assert list(registry.known())[: len(ours)] == list(ours)
    return {f"{name}.md": "\n".join(_page(fusion)).rstrip() + "\n" for name, fusion in ours.items()}


def _page(fusion: Fusion) -> Iterator[str]:
    pattern = importlib.import_module(fusion.match.__module__)
    module = _op(fusion.name)
    text = functools.partial(markdown, page=fusion.name)
    title, found, sections = _split(pattern)
    yield from (NOTE, "", f"# {fusion.name}", "", text(title), "")
    yield from (*_facts(fusion, module), "")
    yield from ("## What is found", "", text(found), "", "## Example", "")
    yield from ("This runs as it stands, without a GPU:", "", "```python")
    yield (DOCS / "examples" / f"{fusion.name}.py").read_text(encoding="utf-8").rstrip()
    yield from ("```", "", "## What is left alone", "")
    for name, above in {"Near misses": NEAR_MISS, "Refused": REFUSED, "Not worth it": WORTH}.items():
        if name in sections:
            yield from (f"### {SECTIONS[name]}", "", above, "", text(sections[name]), "")
    yield from (EVERY, "", "## What is gained", "", text(sections["Gains"]), "", *_measured(fusion.name), "")
    if module is not None:
        yield from _op_part(fusion.name, module, text)


def _facts(fusion: Fusion, module: ModuleType | None) -> Iterator[str]:
    """What the fusion declares, as a list."""
    anchors = dict.fromkeys(f"`{anchor.namespace}.{anchor._opname}`" for anchor in fusion.anchors)
    yield f"- The search starts from: {', '.join(anchors)}."
    dtypes = [dtype_name(dtype) for dtype in fusion.dtypes]
    yield f"- Dtypes of operands: {', '.join(dtypes) if len(dtypes) <= MOST_DTYPES else 'any'}."
    if fusion.absorbs:
        inner = ", ".join(f"[{name}]({name}.md)" for name in fusion.absorbs)
        yield f"- Takes the place of these, where they are part of it: {inner}."
    state = "On by default" if fusion.default else "Off by default"
    yield f'- {state}; `"fusion_passes.fusions": "default,-{fusion.name}"` leaves it out.'
    error = f"a relative error of {fusion.tolerance:g}" if fusion.tolerance else "no difference"
    yield f"- The setting `verify` allows {error}."
    files = [f"[{name}](../../{name})" for name in _sources(fusion.name, module)]
    yield f"- Source: {', '.join(files)}."


def _sources(name: str, module: ModuleType | None) -> list[str]:
    stem = None if module is None else module.__name__.rpartition(".")[2]
    found = [f"patterns/{name}.py", *([f"ops/{stem}.py", f"tests/ops/test_{stem}.py"] if stem else [])]
    return [*found, f"tests/patterns/test_{name}.py"]


def _op(name: str) -> ModuleType | None:
    stem = OPS.get(name, name)
    return None if stem is None else importlib.import_module(f"{ops.__name__}.{stem}")


# --- the op ----------------------------------------------------------------------------------------------------------


def _op_part(name: str, module: ModuleType, text: Callable[[str], str]) -> Iterator[str]:
    stem = module.__name__.rpartition(".")[2]
    function = next(f for f in (getattr(module, stem, None), getattr(module, f"{stem}_", None)) if f is not None)
    body = re.split(r"\n\n(?=Launch parameters:\n)", _doc(module))[0]
    yield from (f"## The op: {function.__name__}", "", text(body), "")
    yield from (f"### {module.__name__}.{function.__name__}", "", "```text", _signature(function), "```", "")
    yield from _function(function, text)
    schemas = [str(getattr(torch.ops.fusion_passes, op).default._schema) for op in _registered(module)]
    yield from ("Graphs call it, with its operands in the kernel's own form, as", "", "```text")
    yield from (*(f"torch.ops.{schema.replace('::', '.', 1)}" for schema in schemas), "```", "")
    yield from _launch(stem, text)


def _registered(module: ModuleType) -> list[str]:
    """Names of the ops that a module registers: its overloads `OP` and others that end so."""
    overloads = [v for k, v in vars(module).items() if k.endswith("OP") and isinstance(v, torch._ops.OpOverload)]
    return [overload._opname for overload in overloads]


def _signature(function: Callable[..., object]) -> str:
    """`f(a: Tensor, *, b: float = 1.0) -> Tensor`, one argument in a line where it is long."""
    signature = inspect.signature(function)
    result = str(signature.return_annotation).strip("'")
    parts, keyword = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword:
            parts.append("*")
            keyword = True
        default = "" if parameter.default is inspect.Parameter.empty else f" = {_value(parameter.default)}"
        parts.append(f"{parameter.name}: {parameter.annotation}{default}")
    return f"{function.__name__}(\n    " + ",\n    ".join(parts) + f",\n) -> {result}"


def _value(default: object) -> str:
    return str(default) if isinstance(default, torch.dtype) else repr(default)


def _function(function: Callable[..., object], text: Callable[[str], str]) -> Iterator[str]:
    parts = re.split(r"\n\n(?=(?:Args|Returns|Raises):\n)", _doc(function))
    yield from (text(parts[0].replace("at the top of this module", "above")), "")
    for part in parts[1:]:
        head, _, rest = part.partition(":\n")
        block = inspect.cleandoc(rest)
        if head == "Returns":
            yield from (f"Returns {text(block)}", "")
            continue
        yield from (f"| {'argument' if head == 'Args' else 'error'} | |", "|---|---|")
        yield from (f"| {_names(names)} | {_cell(text(what))} |" for names, what in _entries(block))
        yield ""


def _launch(op: str, text: Callable[[str], str]) -> Iterator[str]:
    """The launch parameters of an op and the shape classes of its table; both have to be those of the code."""
    yield from ("## Launch parameters", "")
    homes = [path for path in (ROOT / "ops").glob(f"*{op}*.py") if re.fullmatch(rf"{op}|_{op}_\w+", path.stem)]
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in sorted(homes)}
    for stem in (stem for stem in docs if stem == op or "Launch parameters:\n" in docs[stem]):
        importlib.import_module(f"{ops.__name__}.{stem}")  # where the table is; others may need Triton
    table = tuning.TABLES.get(op)
    if table is None:
        yield "There are none to choose: the shape decides."
        return
    doc = "\n\n".join(docs.values())
    parameters = _described(doc, r"Launch parameters:\n", table.names, f"launch parameters of {op}")
    kinds = dict.fromkeys(kind for classes in table.entries.values() for kind in classes)
    classes = _described(doc, r"Shape classes, by .*:\n", tuple(kinds), f"shape classes of {op}")
    size = re.search(r"Shape classes, by (.*):\n", doc)
    assert size is not None
    path, readme = f"ops/tuned/{op}.json", "../../README.md#launch-parameters"
    yield f"From [{path}](../../{path}), by GPU, shape class and size. Others can be forced:"
    yield f'`"fusion_passes.launch": "{op}: {table.names[0]}=..."`, see [Launch parameters]({readme}).'
    yield from ("", "| parameter | | values |", "|---|---|---|")
    for names, what in parameters.items():
        yield f"| {_names(names)} | {_cell(text(what))} | {_allowed(table, names)} |"
    yield from ("", f"| shape class, by {text(size[1])} | |", "|---|---|")
    yield from (f"| {_names(names)} | {_cell(text(what))} |" for names, what in classes.items())


def _allowed(table: tuning.TunedTable, name: str) -> str:
    zero = "0 or " if name in table.may_be_zero else ""
    return zero + ("any number from 1" if name in table.counts else "a power of two")


def _described(doc: str, heading: str, wanted: tuple[str, ...], what: str) -> dict[str, str]:
    match = re.search(heading + r"((?:    .*\n?)+)", doc)
    if match is None:
        raise ValueError(f"no docstring has a section for the {what}")
    found = dict(_entries(inspect.cleandoc(match[1])))
    names = [name for entry in found for name in entry.split(", ")]
    if sorted(names) != sorted(wanted):
        raise ValueError(f"the {what} are {', '.join(wanted)}; the docstring describes {', '.join(names)}")
    return found


# --- figures ---------------------------------------------------------------------------------------------------------


def _measured(name: str) -> Iterator[str]:
    """Where figures are, and how to measure anew."""
    op = OPS.get(name, name)
    lines = []
    for path in sorted((ROOT / "examples" / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if what := _cases_of(name, op, result["rows"]):
            where = result["environment"]
            machine = f"{where['gpu']}, torch {where['torch'].partition('+')[0]}, triton {where['triton']}"
            lines.append(f"- [{path.name}](../../examples/results/{path.name}): {what}; {machine}.")
    if lines:
        yield from ("Figures, which [the README](../../README.md#measured) shows as tables:", "", *lines)
    else:
        yield "No figures are committed for it."
    if op in cases.declared():
        yield from ("", "To measure on a GPU:", "", "```sh", f"python -m fusion_passes bench --op {op}", "```")


def _cases_of(name: str, op: str | None, rows: list[Mapping[str, object]]) -> str:
    """What the rows of a result file hold about a fusion, in words."""
    own = [row for row in rows if row["group"] in (name, op)]
    models = [row for row in rows if row.get("model") and name in _sites(row)]
    found = [f"{len(own)} cases of the op"] if own else []
    if models:
        found.append(f"whole models ({', '.join(dict.fromkeys(str(row['group']) for row in models))})")
    return " and ".join(found)


def _sites(row: Mapping[str, object]) -> set[str]:
    entries = row["entries"]
    assert isinstance(entries, dict)
    return {name for entry in entries.values() for name in entry.get("sites", {})}


# --- docstrings to Markdown ------------------------------------------------------------------------------------------


def _split(pattern: ModuleType) -> tuple[str, str, dict[str, str]]:
    """Title, what is found, and the other sections of a pattern's docstring."""
    title, _, rest = _doc(pattern).partition("\n\nFound:")
    parts = re.split(rf"\n\n({'|'.join(SECTIONS)}):", rest)
    sections = {name: _capital(text.strip()) for name, text in zip(parts[1::2], parts[2::2])}
    for needed in ("Near misses", "Gains"):
        if needed not in sections:
            raise ValueError(f"the docstring of {pattern.__name__} has no section {needed!r}")
    return title, _capital(parts[0].strip()), sections


def _doc(described: object) -> str:
    return inspect.getdoc(described) or ""


def markdown(doc: str, page: str = "") -> str:
    """A docstring as Markdown: indented blocks in fences, names in backticks as links where they have a file."""
    paragraphs: list[str] = []
    for block in re.split(r"\n\n(?!    )|\n\n(?=    )", doc):
        if block.startswith("    "):
            if paragraphs and paragraphs[-1].endswith("\n```"):  # an empty line within a block
                paragraphs[-1] = paragraphs[-1].removesuffix("```") + f"\n{inspect.cleandoc(block)}\n```"
            else:
                paragraphs.append(f"```text\n{inspect.cleandoc(block)}\n```")
        else:
            paragraphs.append(_inline(block, page))
    return "\n\n".join(paragraphs)


def _inline(text: str, page: str) -> str:
    pieces = re.split(r"(`[^`]+`)", text)
    return "".join(_link(p, page) if p.startswith("`") else _escaped(p) for p in pieces)


def _escaped(text: str) -> str:
    """Characters that mean something to Markdown, but for list items and emphasised words."""
    text = re.sub(r"<(?=\w)", "&lt;", text)
    return re.sub(r"\*(?![A-Z][\w ]*\*)(?<!\w\*)", r"\\*", text)


def _link(code: str, page: str) -> str:
    name = code.strip("`")
    if name != page and name in registry.known():
        return f"[{code}]({name}.md)"
    stem = name.removeprefix("fusion_passes.").removeprefix("ops.").removeprefix("patterns.")
    homes = [ROOT / folder / f"{stem}.py" for folder in ("patterns", "ops")] if stem.startswith("_") else []
    homes += [ROOT / "fusion_passes" / f"{stem}.py"] if name.startswith("fusion_passes.") else []
    return next((f"[{code}](../../{home.relative_to(ROOT)})" for home in homes if home.exists()), code)


def _entries(block: str) -> list[tuple[str, str]]:
    """Names and texts of `name: text` and `name, name: text`, with the lines that continue them."""
    return [(m[1], " ".join(m[2].split())) for m in re.finditer(r"^(\S[^:]*): ((?:.*\n?)(?:[ ]+.*\n?)*)", block, re.M)]


def _names(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    main()
