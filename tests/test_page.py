"""The report as a page: its structure, what it says and draws, and what a browser makes of it."""

from __future__ import annotations

import dataclasses
import html.parser
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusion_passes
from fusion_passes.records import Record
from fusion_passes.reports import Report
from fusion_passes.sketches import Box, Drawing, Sketch
from tests import gates

FUSED = Record("gate_cumsum", "fused", "softplus gate", "/m/models/kimi/modeling.py:7", "cumsum", saved_bytes=2_500_000)
REFUSED = Record("qkv_split", "refused", 'raw < 3 & "odd"', "/a/<b>.py:1", "split", hint="make <raw> even")
MISS = Record("gate_cumsum", "near_miss", "over int64", "", "cumsum_3")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta"}


class Page(html.parser.HTMLParser):
    """The elements of a page with their texts; fails where one is not closed, or closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open, f"{self.open} are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def written(report: Report, folder: Path) -> tuple[str, Page]:
    text = report.to_html(folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def drawing(title: str = "add", fused: bool = True) -> Drawing:
    boxes = (Box("input", "x", ("4",), "x"), Box("step", title, ("4",), f"{title} <1>"))
    sketch = Sketch((*boxes, Box("result", "result", (), "r")), ((0, 1), (1, 2)), 1, 0)
    return Drawing(sketch, sketch if fused else None, 1_500_000)


def block(x: Tensor, weight: Tensor, a_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gate, one that is refused, and a sum that is no gate."""
    raw = (x @ weight).unflatten(-1, bias.shape)

    def gate(value: Tensor) -> Tensor:
        return (-a_log.exp()[:, None] * F.softplus(value + bias)).unflatten(1, (-1, 64)).cumsum(2)

    return gate(raw), gate(raw.relu()), x.cumsum(1)


@pytest.fixture(scope="module")
def explained() -> Report:
    return fusion_passes.explain(block, torch.randn(1, 256, 8), torch.randn(8, 64), torch.rand(2), torch.randn(2, 32))


def test_everything_is_escaped_and_closed(tmp_path: Path) -> None:
    text, found = written(Report((FUSED, REFUSED), ("A <note>.",)), tmp_path)
    assert text.startswith("<!doctype html>") and "<b>.py" not in text and "<raw>" not in text
    assert {"A <note>.", "/a/<b>.py:1"} <= set(found.texts["p"])
    assert {"softplus gate", REFUSED.reason, REFUSED.hint, "2.5 MB "} <= set(found.texts["dd"])
    assert [a["title"] for tag, a in found.elements if tag == "p" and "title" in a] == [FUSED.source, REFUSED.source]


def test_the_table_counts_sites_and_adds_up_savings(tmp_path: Path) -> None:
    _, found = written(Report((FUSED, FUSED, dataclasses.replace(MISS, reason="a"), MISS, REFUSED)), tmp_path)
    assert found.texts["th"] == [
        "fusion", "fused", "refused", "near misses", "saves per call (estimate)", "gate_cumsum", "qkv_split",
    ]  # fmt: skip
    assert found.texts["td"] == ["2", "–", "2", "5.0 MB", "–", "1", "–", "–"]
    scopes = [attributes["scope"] for tag, attributes in found.elements if tag == "th"]
    assert scopes == ["col"] * 5 + ["row"] * 2


def test_equal_sites_are_one_entry_whatever_their_nodes_are_called(tmp_path: Path) -> None:
    other = dataclasses.replace(FUSED, node="cumsum_1")
    pictures = {FUSED: drawing(), other: drawing()}
    _, found = written(Report((FUSED, other), drawings=pictures), tmp_path)
    assert found.texts["h3"] == ["gate_cumsum ×2"] and found.count("svg") == 2
    pictures[other] = drawing("subtract")
    _, found = written(Report((FUSED, other), drawings=pictures), tmp_path)
    assert found.texts["h3"] == ["gate_cumsum"] * 2 and found.count("svg") == 4


def test_nothing_found(tmp_path: Path) -> None:
    _, found = written(Report((), ("No search started.",)), tmp_path)
    assert found.texts["p"] == ["No candidate for a fusion was found.", "No search started."]
    assert found.count("table") == found.count("article") == 0


def test_reports_without_drawings_are_told_in_words(tmp_path: Path) -> None:
    _, found = written(Report((FUSED, REFUSED, MISS)), tmp_path)
    assert found.count("article") == 3 and found.count("svg") == found.count("details") == 0


def test_the_line_of_code_is_quoted(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text("import torch\n    y = x.cumsum(1) < 3\n")
    record = dataclasses.replace(FUSED, source=f"{model}:2")
    _, found = written(Report((record, dataclasses.replace(MISS, source="gone.py:9"))), tmp_path)
    assert found.texts["code"] == ["y = x.cumsum(1) < 3"]


def test_a_page_stays_small(tmp_path: Path) -> None:
    records = [dataclasses.replace(FUSED, reason=f"site {i}", node=f"n{i}") for i in range(1000)]
    text, found = written(Report(tuple(records), drawings={r: drawing(r.node) for r in records}), tmp_path)
    assert len(text.encode()) < 2_000_000 and found.count("article") == 1000
    assert found.texts["p"].count("Not drawn, to keep the page small.") == 1000 - found.count("details")
    assert 100 < found.count("details") < 1000


def test_explained_sites_are_drawn(explained: Report, tmp_path: Path) -> None:
    assert [record.outcome for record in explained.records] == ["fused", "refused", "near_miss"]
    text, found = written(explained, tmp_path)
    assert found.texts["figcaption"] == ["Before ", "After ", "Left as it is ", "Around it "]
    assert found.count("svg") == 4
    titles = found.texts["title"]
    assert "gate_cumsum, before: 9 operators and 2 views" in titles
    assert any(title.startswith("the fused op gate_cumsum: gate_cumsum") for title in titles)
    drawn = found.texts["text"]
    assert {"raw", "a_log", "bias", "exponential", "cumulative sum", "one fused op", "result"} <= set(drawn)
    assert {"1 × 256 × 2 × 32", "float32", "is greater than 20"} <= set(drawn)
    assert ["cumsum(2)" in code for code in found.texts["code"]] == [True, True, False]
    assert any("chunks of one of these lengths" in text for text in found.texts["dd"])


def test_the_page_needs_nothing_from_elsewhere(explained: Report, tmp_path: Path) -> None:
    text, found = written(explained, tmp_path)
    assert not re.search(r"https?:|//\w|url\(|@import|<(script|link|img|iframe)", text)
    assert not any({"src", "href", "style"} & set(attributes) for _, attributes in found.elements)
    assert "prefers-color-scheme:dark" in text and len(text) < 60_000


def test_readers_of_the_screen_are_told_what_is_drawn(explained: Report, tmp_path: Path) -> None:
    _, found = written(explained, tmp_path)
    pictures = [attributes for tag, attributes in found.elements if tag == "svg"]
    assert all(picture["role"] == "img" for picture in pictures)
    scrolled = [attributes for _, attributes in found.elements if attributes.get("class") == "scroll"]
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in scrolled) and len(scrolled) == len(pictures)
    assert ("html", {"lang": "en"}) in found.elements and found.count("h1") == 1


def test_json_is_without_drawings(explained: Report) -> None:
    assert explained.drawings and "drawing" not in explained.to_json()
    assert "what would help" in str(explained) and '"hint": "a gate' in explained.to_json()


def test_compiles_draw_nothing() -> None:
    options: dict[str, Any] = {"fusion_passes.reference_on_cpu": True}
    torch.compile(gates.gate, backend="fusion_passes", options=options)(*gates.inputs())
    assert fusion_passes.report().counts == {"gate_cumsum": 1} and not fusion_passes.report().drawings


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1300, 400])
def test_a_browser_shows_it(width: int, explained: Report, tmp_path: Path) -> None:
    path, shot = explained.to_html(tmp_path / "report.html"), tmp_path / "shot.png"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    dom = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=60)
    # A browser repairs what is malformed: nothing may have moved.
    assert dom.stdout.count("<svg") == 4 and dom.stdout.count("<article>") == 3 and "<parsererror" not in dom.stdout
    assert re.sub(r"\s", "", dom.stdout).count("</g>") == path.read_text().count("</g>")
    options = [f"--window-size={width},1000", f"--screenshot={shot}", path.as_uri()]
    subprocess.run([*command, *options], capture_output=True, timeout=60, check=True)
    data = shot.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (width, 1000) and len(data) > 20_000
