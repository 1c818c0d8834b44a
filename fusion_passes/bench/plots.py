"""Pictures of results: bars of GPU time per case, and how near the cases come to the roofline."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_passes.bench.results import Results, Row
from fusion_passes.bench.tables import TITLES, contestants

# Ours stands out; the others are told apart by lightness, also in print.
_COLOURS = {
    "fused": "#d1495b",
    "bound": "#8f2d56",
    "op": "#e8a0aa",
    "stock": "#30638e",
    "combo_kernels": "#5b8fb9",
    "max_autotune": "#9dbfd9",
    "eager": "#c9c9c9",
}
# A bar that is longer than this many times stock's is cut off, and its label says how long it is.
_WIDEST = 2.0
# Few colours make small files: a picture of twenty cases stays under 100 kB.
_DPI, _PALETTE = 120, 160
_OTHERS = ("#66a182", "#edae49", "#8d6a9f", "#00798c")


def draw(results: Results, folder: Path) -> list[Path]:
    """Write `<group>_times.png` for every op and model, and `roofline.png` for the ops, into `folder`.

    The roofline needs the rates of the GPU, which `benchmarking.environment` records.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    require()
    importlib.import_module("matplotlib").use("agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    where = f"{results.environment.get('gpu', 'unknown GPU')}, torch {results.environment.get('torch', '?')}"
    written = []
    for group in dict.fromkeys(row.group for row in results.rows):
        figure = _bars(pyplot, [row for row in results.rows if row.group == group], f"{group} on {where}")
        written.append(_save(pyplot, figure, folder / f"{group}_times.png"))
    cases = [row for row in results.rows if not row.model and row.bytes]
    copy_rate, matmul_rate = (float(results.environment.get(f"assumed_{of}_rate", 0)) for of in ("copy", "matmul"))
    if cases and copy_rate and matmul_rate:
        figure = _roofline(pyplot, cases, copy_rate, matmul_rate, where)
        written.append(_save(pyplot, figure, folder / "roofline.png"))
    return written


def require() -> None:
    """Raise an ImportError that says what to install unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install 'fusion-passes[bench]'")


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    image = importlib.import_module("PIL.Image")  # matplotlib needs pillow itself
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, bbox_inches="tight")
    pyplot.close(figure)
    image.open(buffer).convert("RGB").quantize(_PALETTE).save(path, optimize=True)
    return path


def _colours(names: Sequence[str]) -> dict[str, str]:
    others = [name for name in names if name not in _COLOURS]
    return {**_COLOURS, **{name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}}


def _bars(pyplot: Any, rows: Sequence[Row], title: str) -> Any:
    """Horizontal bars, a band for each case: times as multiples of stock's, labelled with the times themselves."""
    names = [name for name in contestants(rows) if any(row.gpu_us(name) for row in rows)]
    colours = _colours(names)
    scale, unit = (1e3, "ms") if rows[0].model else (1.0, "us")
    timed = [[(name, time) for name in names if (time := row.gpu_us(name))] for row in rows]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.15 * sum(len(times) + 1 for times in timed)))
    edge, middles, shown, without = 0.0, [], {}, False
    for row, times in zip(rows, timed):
        without |= not row.gpu_us("stock")
        for i, (name, time) in enumerate(times):
            share, place = time / _unit_of(row), edge + i + 0.5
            shown[name] = axes.barh(place, min(share, _WIDEST), 0.96, color=colours[name])
            text = f" {_number(time / scale)}" + (f" ({share:.1f} x)" if share > _WIDEST else "")
            axes.text(min(share, _WIDEST), place, text, va="center", fontsize=7)
        middles.append(edge + max(len(times), 1) / 2)
        if row.floor_us and times:
            floor = row.floor_us / _unit_of(row)
            (shown["floor"],) = axes.plot([floor] * 2, [edge - 0.1, edge + len(times) + 0.1], color="black", lw=1.5)
        edge += max(len(times), 1) + 1
    axes.set_yticks(middles, [row.case for row in rows])
    axes.set_ylim(edge - 0.5, -0.5)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)  # room for the label of the longest bar
    of = "stock" + (", of the first bar where stock has none" if without else "")
    axes.set_xlabel(f"GPU time per call as a multiple of {of}; the labels are in {unit}")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    order = [name for name in (*names, "floor") if name in shown]
    labels = [TITLES.get(name, name) for name in order]
    axes.legend([shown[name] for name in order], labels, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _number(value: float) -> str:
    """Three digits, thousands with a comma: 0.92, 33.6, 1,240."""
    return f"{value:.3g}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


def _unit_of(row: Row) -> float:
    """The time that counts as 1: stock's, else that of whatever was timed first."""
    times = [row.gpu_us(name) for name in ("stock", *row.entries)]
    return next((time for time in times if time), 1.0)


def _roofline(pyplot: Any, rows: Sequence[Row], copy_rate: float, matmul_rate: float, where: str) -> Any:
    """Left: FLOP/s against FLOPs per byte, under the roof. Right: the share of the floor against the bytes moved."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    intensities = [row.flops / row.bytes for row in rows if row.flops]
    ridge = matmul_rate / copy_rate
    low, high = min([*intensities, 1.0]) / 4, max([*intensities, ridge]) * 4
    left.plot([low, ridge, high], [low * copy_rate, matmul_rate, matmul_rate], color="black", linewidth=1.5)
    on_top = {"zorder": 3, "clip_on": False}
    for name, marker in (("stock", "o"), ("fused", "D"), ("op", "x")):
        timed = [(row, time) for row in rows if (time := row.gpu_us(name))]
        if not timed:
            continue
        look = {"s": 18, "marker": marker, "color": _COLOURS[name], "label": TITLES[name]} | on_top
        points = [(row.flops / row.bytes, row.flops / time * 1e6) for row, time in timed if row.flops]
        left.scatter([x for x, _ in points], [y for _, y in points], **look)
        shares = [(row.bytes, 100 * (row.floor_us or 0.0) / time) for row, time in timed]
        right.scatter([x for x, _ in shares], [y for _, y in shares], **look)
    left.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="FLOP/s", title="Roofline")
    right.axhline(100, color="black", linewidth=1.5)
    right.set(xscale="log", ylim=(0, None), xlabel="bytes read and written", ylabel="floor / time, %")
    right.set_title("Distance from the roof")
    for axes in (left, right):
        axes.grid(which="both", alpha=0.2)
        axes.set_axisbelow(True)
        axes.xaxis.set_minor_formatter(pyplot.NullFormatter())  # between few decades these run into each other
    ticker = importlib.import_module("matplotlib.ticker")
    few = max(row.bytes for row in rows) < 100 * min(row.bytes for row in rows)
    right.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
    right.xaxis.set_major_formatter(ticker.EngFormatter("B"))
    right.legend(fontsize=8)
    ops = ", ".join(dict.fromkeys(row.group for row in rows))
    figure.suptitle(f"{ops} on {where}: {copy_rate / 1e12:.2f} TB/s, {matmul_rate / 1e12:.0f} TFLOP/s", fontsize=10)
    figure.tight_layout()
    return figure
