"""What a benchmark leaves behind: JSON, tables, comparison, verdicts and pictures."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fusion_passes.__main__ import main
from fusion_passes.bench import comparison, plots, results, tables, verdicts
from fusion_passes.bench.results import Entry, Results, Row

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted((ROOT / "examples" / "results").glob("*.json"))

FUSED = Entry(10.0, 30.0, 1e-7, {"gate_cumsum": 1})
STOCK = Entry(20.0, 30.0, 5e-8)
MODEL = Row(
    "kimi_linear", "T=2048 B=1 layers=2",
    {"fused": Entry(6820.0, 7000.0, 0.013, {"gate_cumsum": 1}, first_call_s=26.14, kernels=412, peak_mb=758),
     "stock": Entry(failed="RuntimeError: out of memory")},
    bound=0.03, model=True,
)  # fmt: skip
HOME = {"gpu": "NVIDIA H200", "torch": "2.11.0", "assumed_copy_rate": 4.25e12, "assumed_matmul_rate": 7.86e14}


def row(case: str = "T=128", **entries: Entry) -> Row:
    return Row("gate_cumsum", case, entries or {"fused": FUSED, "stock": STOCK}, 4_250_000, 1000, 1.0, 3e-7)


def taken(*rows: Row, **environment: Any) -> Results:
    return Results(rows, {**HOME, **environment}, "python -m fusion_passes bench", "2026-01-01T00:00:00+00:00")


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    failed = Entry(error=0.5, failed="relative error")
    written = taken(row(), MODEL, row("T=1", op=failed, fla=Entry(note="left alone")))
    written.write(tmp_path / "a" / "b.json")
    assert results.read(tmp_path / "a" / "b.json") == written
    text = (tmp_path / "a" / "b.json").read_text()
    assert len([line for line in text.splitlines() if '"group"' in line]) == 3
    assert "null" not in text and '"note": ""' not in text


def test_numbers_are_rounded_to_what_is_known() -> None:
    entry = Entry(1.23456, 7.89012, 1.2345e-7, first_call_s=3.14159)
    assert (entry.gpu_us, entry.wall_us, entry.error, entry.first_call_s) == (1.23, 7.9, 1.2e-7, 3.1)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "Expecting property name"),
        ("[]", "its format is 'list', and this version reads 1"),
        ('{"cases": []}', "its format is None, and this version reads 1"),
        ('{"format": 1}', "it has no 'rows'"),
        ('{"format": 1, "rows": [{"entries": {}, "speed": 1}]}', "unexpected keyword argument 'speed'"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} holds no benchmark results: ") + ".*" + re.escape(words)):
        results.read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.json holds no benchmark results: .*No such file"):
        results.read(tmp_path / "none.json")


@pytest.mark.skipif(not COMMITTED, reason="needs a checkout")
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_say_where_they_are_from(path: Path) -> None:
    found = results.read(path)
    assert found.rows and found.date
    assert {"gpu", "torch", "triton", "commit", "assumed_copy_rate"} <= set(found.environment)
    warm = found.environment.get("inputs") == "warm"
    assert not warm or path.with_name(path.name.replace("_warm", "")) in COMMITTED
    for one in found.rows:
        # Ours, and something to compare it with, unless that stands in the results of cold inputs; stock cannot compile
        # every case in reasonable time.
        assert one.gpu_us(one.ours), one.name
        others = ("stock", "fla", *(["eager"] if one.model else []))
        assert warm or any(map(one.gpu_us, others)), one.name
        assert one.model or one.floor_us == pytest.approx(1e6 * max(one.bytes / 4.25e12, one.flops / 7.86e14), abs=0.01)


@pytest.mark.skipif(not COMMITTED, reason="needs a checkout")
def test_no_committed_case_is_slower_on_the_gpu() -> None:
    rows = [one for path in COMMITTED for one in results.read(path).rows]
    compared = [one for one in rows if {"fused", "bound"} & one.entries.keys() and "stock" in one.entries]
    assert len(compared) > 80
    # Bursts of other work on the host show in single wall times; the README names those.
    assert [text for text in verdicts.failures(rows) if "wall time" not in text] == []


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_a_good_row_has_no_failures() -> None:
    assert verdicts.failures([row(), row(fused=FUSED)]) == []


@pytest.mark.parametrize("judge", ["stock", "combo_kernels"])
@pytest.mark.parametrize(
    "gpu, wall, words",
    [
        (10.2, 31.5, []),
        (10.21, 31.5, ["GPU time 10.2 us is 2 % above {} (10.0 us)"]),
        (10.2, 31.6, ["wall time 31.6 us is 5 % above {} (30.0 us)"]),
        (20.0, 60.0, ["GPU time 20.0 us is 100 % above {} (10.0 us)", "wall time 60.0 us is 100 % above {} (30.0 us)"]),
    ],
)
def test_slower_than_stock_fails(judge: str, gpu: float, wall: float, words: list[str]) -> None:
    slow = dataclasses.replace(FUSED, gpu_us=gpu, wall_us=wall)
    entries = {"fused": slow, judge: Entry(10.0, 30.0, 0.0)}
    found = verdicts.failures([dataclasses.replace(row(), entries=entries)])
    assert found == [f"gate_cumsum T=128: {text.format(judge)}" for text in words]


def test_slower_is_no_failure_where_nothing_was_fused_or_another_is_the_judge() -> None:
    slow = dataclasses.replace(FUSED, gpu_us=99.0)
    left_alone = dataclasses.replace(slow, sites={"gate_cumsum": 0})
    assert verdicts.failures([row(fused=left_alone, stock=STOCK), row(fused=slow, max_autotune=STOCK)]) == []
    assert verdicts.failures([row(fused=slow, stock=Entry(1.0, 1.0, failed="wrong"))]) == []


def test_each_of_our_compiles_is_judged() -> None:
    slow = dataclasses.replace(FUSED, gpu_us=99.0)
    found = verdicts.failures([row(fused=FUSED, bound=slow, stock=STOCK)])
    assert found == ["gate_cumsum T=128: bound: GPU time 99.0 us is 395 % above stock (20.0 us)"]
    assert row(bound=FUSED, op=FUSED).ours == "bound"


def test_a_wrong_result_of_ours_fails_and_of_others_does_not() -> None:
    wrong = verdicts.gate(Entry(1.0, 1.0, 1e-3), 1e-6)
    assert wrong == Entry(error=1e-3, failed="relative error 1.0e-03 is above 1.0e-06")
    assert verdicts.gate(FUSED, 1e-7) == FUSED
    found = verdicts.failures([row(fused=wrong, op=FUSED), row(fused=FUSED, op=wrong), row(fused=FUSED, fla=wrong)])
    assert found == [
        "gate_cumsum T=128: fused: relative error 1.0e-03 is above 1.0e-06",
        "gate_cumsum T=128: op: relative error 1.0e-03 is above 1.0e-06",
    ]


# --- comparison ------------------------------------------------------------------------------------------------------


def changed(**fields: Any) -> Results:
    return taken(row(fused=dataclasses.replace(FUSED, **fields), stock=STOCK))


def test_nothing_within_the_tolerance() -> None:
    found = comparison.compare(taken(row()), changed(gpu_us=10.5, wall_us=33.0))
    assert found == comparison.Comparison((), (), ()) and str(found) == "no difference beyond the tolerance"


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"gpu_us": 10.6}, "10 -> 10.6 us GPU (+6 %)"),
        ({"wall_us": 33.1}, "30 -> 33.1 us wall (+10 %)"),
        ({"error": 2.1e-7}, "error 1.0e-07 -> 2.1e-07"),
        ({"sites": {"gate_cumsum": 0}}, "gate_cumsum is fused at 0 places, it was at 1"),
        ({"sites": None}, "gate_cumsum is fused at 0 places, it was at 1"),
        ({"gpu_us": None, "failed": "wrong"}, "fails now: wrong"),
    ],
)
def test_regressions(fields: dict[str, Any], words: str) -> None:
    found = comparison.compare(taken(row()), changed(**fields))
    assert found.regressions == (f"gate_cumsum T=128, fused: {words}",) and not found.improvements
    assert str(found).startswith("Slower or worse (1)\n  gate_cumsum T=128, fused: ")
    # The other way round it is no regression.
    assert not comparison.compare(changed(**fields), taken(row())).regressions


def test_improvements_and_the_tolerance() -> None:
    found = comparison.compare(taken(row()), changed(gpu_us=8.0))
    assert found.improvements == ("gate_cumsum T=128, fused: 10 -> 8 us GPU (-20 %)",) and not found.regressions
    assert comparison.compare(taken(row()), changed(gpu_us=8.0), tolerance=0.25).improvements == ()


def test_differences_below_the_clock_do_not_count() -> None:
    short = dataclasses.replace(FUSED, gpu_us=1.0, wall_us=10.0)
    longer = dataclasses.replace(FUSED, gpu_us=1.09, wall_us=12.0)
    assert not comparison.compare(taken(row(fused=short)), taken(row(fused=longer))).regressions


def test_peak_memory_of_models_counts() -> None:
    entry = dataclasses.replace(MODEL.entries["fused"], peak_mb=900)
    found = comparison.compare(taken(MODEL), taken(dataclasses.replace(MODEL, entries={"fused": entry})))
    assert found.regressions == ("kimi_linear T=2048 B=1 layers=2, fused: 758 -> 900 MiB peak (+19 %)",)


def test_remarks_on_what_else_changed() -> None:
    moved = row(fused=FUSED, stock=dataclasses.replace(STOCK, gpu_us=25.0))
    found = comparison.compare(taken(row(), row("old")), taken(moved, row("new"), torch="2.12.0"))
    assert found.remarks == (
        "gate_cumsum old: only in the old results",
        "gate_cumsum new: only in the new results",
        "torch: 2.11.0 before, 2.12.0 now",
        "gate_cumsum T=128: stock moved too, 20 -> 25 us GPU",
    )


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different GPUs do not compare: NVIDIA H200 and NVIDIA B200"):
        comparison.compare(taken(row()), taken(row(), gpu="NVIDIA B200"))
    with pytest.raises(ValueError, match="no case in common"):
        comparison.compare(taken(row("a")), taken(row("b")))


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    taken(row()).write(Path(old))
    changed(gpu_us=13.0).write(Path(new))
    assert main(["bench", "--compare", old, new]) == 1
    assert "10 -> 13 us GPU (+30 %)" in capsys.readouterr().out
    assert main(["bench", "--compare", old, new, "--tolerance", "0.4"]) == 0
    assert main(["bench", "--compare", new, old]) == 0
    assert "Faster (1)" in capsys.readouterr().out.split("no difference")[1]


# --- tables ----------------------------------------------------------------------------------------------------------


def test_table_of_cases() -> None:
    wrong = Entry(error=0.5, failed="relative error")
    other = row("T=2", op=Entry(4.0, 5.0, 1e-7), stock=wrong, mine=Entry(failed="not installed"))
    text = tables.markdown([row(), other])
    assert text.splitlines() == [
        "| case | floor | fused | bare op | stock | mine | of floor | error fused | error stock |",
        "|---|---|---|---|---|---|---|---|---|",
        "| T=128 | 1.0 | **10.0** | – | 20.0 | – | 10 % | 1e-07 | 5e-08 |",
        "| T=2 | 1.0 | – | **4.0** | failed | – | 25 % | – | 5e-01 |",
    ]


def test_table_of_models_and_of_several_ops() -> None:
    text = tables.markdown([row(), dataclasses.replace(row(), group="other"), MODEL])
    assert "\n| other T=128 |" in text and "\n| gate_cumsum T=128 |" in text
    assert text.splitlines()[-2:] == [
        "| kimi_linear T=2048 B=1 layers=2 | fused | 6.82 | 7.00 | 412 | 758 | 26.1 | gate_cumsum 1 | 1e-02 |",
        "| kimi_linear T=2048 B=1 layers=2 | stock | failed | – | – | – | – | – | – |",
    ]


def test_table_of_models_says_how_much_memory_is_not_weights() -> None:
    lines = tables.markdown([dataclasses.replace(MODEL, weights_mb=700), MODEL]).splitlines()
    assert "| kernels | peak MiB | above weights | first call s |" in lines[0]
    assert [line.count("|") for line in lines] == [lines[0].count("|")] * 6
    assert "| 412 | 758 | 58 | 26.1 |" in lines[2] and "| 412 | 758 | – | 26.1 |" in lines[4]


def test_summary_of_a_row() -> None:
    left = dataclasses.replace(FUSED, note="left alone: too small")
    text = tables.summary(row(fused=left, stock=STOCK, fla=Entry(failed="not installed")))
    assert text == (
        "gate_cumsum T=128: us GPU (wall) fused 10.00 (30.0), stock 20.00 (30.0), fla –; 10 % of the floor; "
        "fused: left alone: too small; fla: not installed"
    )
    assert "ms GPU (wall) fused 6.82 (7.0), stock –" in tables.summary(MODEL)


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs a checkout")
def test_the_tables_of_the_readme_are_those_of_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    marked = r"^<!-- python -m fusion_passes (bench --from (\S+) --table) -->\n((?:^\|.*\|\n)+)"
    found = re.findall(marked, (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert found
    for command, path, shown in found:
        assert main([str(ROOT / word) if word == path else word for word in command.split()]) == 0
        assert capsys.readouterr().out == shown


# --- pictures --------------------------------------------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(f"T={n}", fused=FUSED, stock=STOCK, eager=Entry(90.0, 99.0, 0.0), other=STOCK) for n in range(4)]
    written = plots.draw(taken(*rows, MODEL), tmp_path / "made")
    assert [path.name for path in written] == ["gate_cumsum_times.png", "kimi_linear_times.png", "roofline.png"]
    assert all(min(png_size(path)) > 100 for path in written)


@pytest.mark.skipif(not COMMITTED, reason="needs a checkout")
def test_pictures_of_the_committed_results_are_small_enough_to_commit(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    most = max(COMMITTED, key=lambda path: path.stat().st_size)
    written = plots.draw(results.read(most), tmp_path)
    assert any(path.name == "roofline.png" for path in written)
    assert all(path.stat().st_size < 100_000 for path in written)


@pytest.mark.parametrize("value, text", [(0.918, "0.918"), (33.6, "33.6"), (999, "999"), (1239.3, "1,240")])
def test_labels_have_three_digits(value: float, text: str) -> None:
    assert plots._number(value) == text


def test_no_roofline_without_the_rates_of_the_gpu_nor_for_models(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert len(plots.draw(Results((row(),), {"gpu": "some GPU"}), tmp_path)) == 1
    assert [path.name for path in plots.draw(taken(MODEL), tmp_path)] == ["kimi_linear_times.png"]


def test_pictures_say_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = tmp_path / "r.json"
    taken(row()).write(path)
    assert main(["bench", "--from", str(path), "--plot", str(tmp_path)]) == 2
    assert "plots need matplotlib: pip install 'fusion-passes[bench]'" in capsys.readouterr().err


def test_pictures_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, copy = tmp_path / "r.json", tmp_path / "copy.json"
    taken(row()).write(path)
    assert main(["bench", "--from", str(path), "--plot", str(tmp_path / "plots"), "--json", str(copy)]) == 0
    printed = capsys.readouterr()
    assert printed.err.count(".png") == 2 and not printed.out
    assert json.loads(copy.read_text()) == json.loads(path.read_text())
