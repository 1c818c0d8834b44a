"""Tuned tables and the ways to override them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fusion_passes
from fusion_passes import arch, config, tuning

H200 = arch.by_name("sm_90")


@pytest.fixture
def table(tmp_path: Path) -> tuning.TunedTable:
    path = tmp_path / "table.json"
    rows: list[dict[str, Any]] = [{"up_to": 100, "rows": 1, "flag": 0}, {"up_to": None, "rows": 2, "flag": 1}]
    path.write_text(json.dumps({"default": {"x": rows, "y": rows}, "sm_90": {"x": [{**rows[1], "rows": 8}]}}))
    return tuning.TunedTable("some_op", path, ("rows", "flag"), ("flag",))


def choose(table: tuning.TunedTable) -> tuning.Parameters:
    return table.choose(H200, "x", 1, fit=lambda p: p, complaint=lambda p: "it is odd" if p["rows"] == 1 else None)


def test_table(table: tuning.TunedTable) -> None:
    assert table.tuned(H200, "x", 5) == {"rows": 8, "flag": 1}
    assert table.tuned(H200, "y", 100) == {"rows": 1, "flag": 0}
    assert table.tuned(arch.by_name("sm_80"), "x", 101) == {"rows": 2, "flag": 1}


def test_overrides_in_order(table: tuning.TunedTable) -> None:
    with config.patch(launch="other: rows=3; some_op: rows = 32, flag = 0"):
        assert choose(table) == {"rows": 32, "flag": 0}
        with tuning.overriding(some_op={"rows": 64}):
            assert choose(table) == {"rows": 64, "flag": 1}
    assert choose(table) == {"rows": 8, "flag": 1}


@pytest.mark.parametrize(
    "text, words",
    [
        ("row=1", "the setting launch: some_op has no launch parameter 'row'; it has rows, flag"),
        ("rows=3", "rows of some_op must be a power of two, got 3"),
        ("flag=3", "flag of some_op must be 0 or a power of two, got 3"),
        ("rows", "written 'name=number,name=number', got 'rows'"),
        ("rows=x", "got 'rows=x'"),
        ("rows=1", "the setting launch gives {'rows': 1}, but it is odd"),
    ],
)
def test_bad_overrides(table: tuning.TunedTable, text: str, words: str) -> None:
    with config.patch(launch=f"some_op: {text}"), pytest.raises(ValueError, match=words):
        choose(table)


def test_settings_are_checked_before_anything_is_compiled(table: tuning.TunedTable) -> None:
    with pytest.raises(ValueError, match="there is no tuned op 'gate_sum'; there are .*gate_cumsum"):
        fusion_passes.options(launch="gate_sum: rows=1")
    with pytest.raises(ValueError, match="gate_cumsum has no launch parameter 'row'"):
        fusion_passes.options(launch="gate_cumsum: row=1")


def test_bad_setting(table: tuning.TunedTable) -> None:
    with config.patch(launch="rows=1"), pytest.raises(ValueError, match="written 'op: name=number"):
        choose(table)


def test_bad_table(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"default": {"x": [{"up_to": None, "rows": 2}]}}))
    with pytest.raises(ValueError, match="bad.json: default/x must give up_to, rows, flag"):
        tuning.TunedTable("some_op", path, ("rows", "flag"), ("flag",))


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'sm_7': it must be one of gfx942, sm_100"):
        arch.by_name("sm_7")
