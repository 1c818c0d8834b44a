"""Results as a Markdown table and as one line per row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusion_passes.bench.results import Row

TITLES = {
    "fused": "fused",
    "bound": "bound",
    "op": "bare op",
    "stock": "stock",
    "combo_kernels": "combo_kernels",
    "max_autotune": "max-autotune",
    "eager": "eager",
    "fla": "FLA",
}


def contestants(rows: Iterable[Row]) -> list[str]:
    """Every contestant of the rows: the well-known ones in the order of their titles, then the others."""
    found = dict.fromkeys(name for row in rows for name in row.entries)
    return [name for name in TITLES if name in found] + [name for name in found if name not in TITLES]


def markdown(rows: Sequence[Row]) -> str:
    """Tables for README.md, the cases of the ops and the models apart; GPU times in microseconds, of models in ms.

    A dash: not measured. `failed`: an error, or a result that is not right.
    """
    cases, models = [row for row in rows if not row.model], [row for row in rows if row.model]
    return "\n\n".join([_cases(cases)] * bool(cases) + [_models(models)] * bool(models))


def _cases(rows: Sequence[Row]) -> str:
    names = contestants(rows)
    several = len({row.group for row in rows}) > 1
    head = ["case", "floor", *(TITLES.get(name, name) for name in names), "of floor"]
    errors = [name for name in ("fused", "op", "stock") if name in names and not (name == "op" and "fused" in names)]
    lines = [_line([*head, *(f"error {name}" for name in errors)]), "|" + "---|" * (len(head) + len(errors))]
    for row in rows:
        ours = row.gpu_us(row.ours)
        share = f"{100 * row.floor_us / ours:.0f} %" if ours and row.floor_us is not None else "–"
        floor = "–" if row.floor_us is None else f"{row.floor_us:.1f}"
        cells = [row.name if several else row.case, floor, *(_time(row, name) for name in names), share]
        lines.append(_line([*cells, *(_error(row, name) for name in errors)]))
    return "\n".join(lines)


def _models(rows: Sequence[Row]) -> str:
    weighed = any(row.weights_mb for row in rows)
    peaks = ["peak MiB", *(["above weights"] if weighed else [])]
    head = ["model", "contestant", "GPU ms", "wall ms", "kernels", *peaks, "first call s", "sites", "error"]
    lines = [_line(head), "|" + "---|" * len(head)]
    for row in rows:
        for name, entry in row.entries.items():
            if entry.failed:
                lines.append(_line([row.name, TITLES.get(name, name), "failed", *["–"] * (len(head) - 3)]))
                continue
            times = [f"{value / 1e3:.2f}" if value is not None else "–" for value in (entry.gpu_us, entry.wall_us)]
            above = entry.peak_mb - row.weights_mb if entry.peak_mb is not None and row.weights_mb else None
            numbers = [entry.kernels, entry.peak_mb, *([above] if weighed else []), entry.first_call_s]
            rest = ["–" if value is None else str(value) for value in numbers]
            sites = ", ".join(f"{site} {count}" for site, count in (entry.sites or {}).items()) or "–"
            lines.append(_line([row.name, TITLES.get(name, name), *times, *rest, sites, _error(row, name)]))
    return "\n".join(lines)


def summary(row: Row) -> str:
    """One line for the terminal: times of all contestants, and how near the floor ours is."""
    unit, scale = ("ms", 1e3) if row.model else ("us", 1.0)
    parts = []
    for name, entry in row.entries.items():
        if entry.failed or entry.gpu_us is None:
            parts.append(f"{name} –")
            continue
        wall = f" ({entry.wall_us / scale:.1f})" if entry.wall_us is not None else ""
        parts.append(f"{name} {entry.gpu_us / scale:.2f}{wall}")
    text = f"{row.name}: {unit} GPU (wall) {', '.join(parts)}"
    ours = row.gpu_us(row.ours)
    if ours and row.floor_us is not None:
        text += f"; {100 * row.floor_us / ours:.0f} % of the floor"
    notes = {name: entry.failed or entry.note for name, entry in row.entries.items()}
    return "; ".join([text, *(f"{name}: {note}" for name, note in notes.items() if note)])


def _time(row: Row, name: str) -> str:
    entry = row.entries.get(name)
    if entry is None or entry.gpu_us is None:
        return "failed" if entry is not None and entry.error is not None and entry.failed else "–"
    return f"**{entry.gpu_us:.1f}**" if name == row.ours else f"{entry.gpu_us:.1f}"


def _error(row: Row, name: str) -> str:
    entry = row.entries.get(name)
    return "–" if entry is None or entry.error is None else f"{entry.error:.0e}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
