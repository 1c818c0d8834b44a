"""Report as text, JSON and HTML, and the records behind it."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest
import torch

import fusion_passes
from fusion_passes import records
from fusion_passes.records import Record
from fusion_passes.reports import Report, saved
from tests import gates

FUSED = Record("gate_cumsum", "fused", "softplus gate", "/m/models/kimi/modeling.py:7", "cumsum", saved_bytes=2_500_000)
REFUSED = Record("qkv_split", "refused", 'raw < 3 & "odd"', "/a/<b>.py:1", "split")
MISS = Record("gate_cumsum", "near_miss", "over int64", "", "cumsum_3")


def test_counts_are_of_fused_sites_and_missing_names_are_zero() -> None:
    report = Report((FUSED, FUSED, REFUSED, MISS))
    assert report.counts == {"gate_cumsum": 2}
    assert report.counts["qkv_split"] == 0 and "qkv_split" not in report.counts
    assert report.fused == [FUSED, FUSED] and report.refusals == [REFUSED] and report.near_misses == [MISS]


def test_text_groups_equal_records_and_shortens_paths() -> None:
    text = str(Report((FUSED, MISS, FUSED), ("A note.",)))
    assert text.splitlines() == [
        "fusion_passes: fused gate_cumsum 2",
        "",
        "Fused",
        "  gate_cumsum x2  models/kimi/modeling.py:7",
        "      softplus gate; saves 2.5 MB per call",
        "",
        "Near misses: looked at and found to be something else",
        "  gate_cumsum  cumsum_3",
        "      over int64",
        "",
        "A note.",
    ]


def test_text_of_nothing() -> None:
    assert str(Report(())) == "fusion_passes: no candidate for a fusion was found"
    assert str(Report((), ("A note.",))).splitlines()[1:] == ["A note."]
    assert str(Report((MISS,))).startswith("fusion_passes: fused nothing\n")


@pytest.mark.parametrize(
    "count, launches, words",
    [
        (None, None, ""),
        (0, None, "0 B"),
        (900, 0, "900 B"),
        (4096, 1, "4.1 kB, 1 launch"),
        (None, 3, "3 launches"),
        (1_234_567_890, 2, "1,234.6 MB, 2 launches"),
    ],
)
def test_savings_in_words(count: int | None, launches: int | None, words: str) -> None:
    record = dataclasses.replace(FUSED, saved_bytes=count, saved_launches=launches)
    assert saved([record]) == words
    assert ("saves" in str(Report((record,)))) == bool(words)


def test_savings_of_several_sites_add_up() -> None:
    assert saved([FUSED, dataclasses.replace(FUSED, saved_launches=2), MISS]) == "5.0 MB, 2 launches"


def test_text_says_what_would_help() -> None:
    lines = str(Report((dataclasses.replace(MISS, hint="call .float() first"),))).splitlines()
    assert lines[-2:] == ["      over int64", "      what would help: call .float() first"]


def test_json_holds_every_field() -> None:
    data = json.loads(Report((FUSED, REFUSED, MISS), ("A note.",)).to_json())
    assert list(data) == ["counts", "fused", "refusals", "near_misses", "notes"]
    assert data["counts"] == {"gate_cumsum": 1} and data["notes"] == ["A note."]
    assert [Record(**r) for r in data["fused"] + data["refusals"] + data["near_misses"]] == [FUSED, REFUSED, MISS]


def test_records_come_back_in_order_and_as_often_as_kept() -> None:
    records.remember([FUSED, MISS, FUSED])
    assert records.recall() == [FUSED, FUSED, MISS]
    assert fusion_passes.report().counts["gate_cumsum"] == 2


def test_source_is_the_models_line_and_not_torchs() -> None:
    def frames(*paths: str) -> str:
        return "".join(f'  File "{p}", line {i}, in forward\n    x\n' for i, p in enumerate(paths))

    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    user = graph.call_function(torch.relu, (node,))
    assert records.source_of(user) == ""
    node.meta["stack_trace"] = frames("/m/input.py")
    assert records.source_of(user) == "/m/input.py:0"
    user.meta["stack_trace"] = frames("/m/outer.py", "/m/model.py", "/lib/torch/nn/functional.py")
    assert records.source_of(user) == "/m/model.py:1"


def test_report_covers_all_compiles_of_the_process() -> None:
    args = gates.inputs()
    options: dict[str, Any] = {"fusion_passes.reference_on_cpu": True}
    for f in (gates.gate, lambda *a: gates.gate(*a).transpose(1, 2)):
        torch.compile(f, backend="fusion_passes", options=options)(*args)
    report = fusion_passes.report()
    assert report.counts == {"gate_cumsum": 2} and len({r.graph for r in report.fused}) == 2


def test_rich_shows_the_same_words_in_colours() -> None:
    console = pytest.importorskip("rich.console", reason="needs rich: pip install rich")
    report = Report((FUSED, dataclasses.replace(REFUSED, hint="do this"), MISS), ("A note [of sorts].",))
    printed = console.Console(width=200, file=io.StringIO())
    printed.print(report)
    lines = [line.rstrip() for line in printed.file.getvalue().splitlines()]
    assert lines == str(report).splitlines()
    coloured = console.Console(width=200, file=io.StringIO(), force_terminal=True, color_system="standard")
    coloured.print(report)
    assert "\x1b[1;32mFused" in coloured.file.getvalue()


def test_narrow_terminals_keep_the_indentation() -> None:
    console = pytest.importorskip("rich.console", reason="needs rich: pip install rich")
    printed = console.Console(width=40, file=io.StringIO())
    printed.print(Report((dataclasses.replace(FUSED, reason="word " * 30),)))
    reason = [line for line in printed.file.getvalue().splitlines() if "word" in line]
    assert len(reason) > 3 and all(line.startswith("      word") for line in reason)


@pytest.mark.parametrize("installed", [True, False])
def test_show_is_plain_where_it_is_read_by_programs(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not installed:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = Report((FUSED, REFUSED))
    report.show()
    assert capsys.readouterr().out == f"{report}\n"
