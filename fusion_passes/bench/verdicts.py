"""Whether a row may stand: ours is right, and where the pass rewrote something not slower than stock Inductor."""

from __future__ import annotations

from collections.abc import Iterable

from fusion_passes.bench.results import COMPILED, OURS, Entry, Row

# What we must not be slower than, and by which share of the time, on the GPU and in wall time.
JUDGES = ("stock", "combo_kernels")
GPU_TOLERANCE = 0.02
WALL_TOLERANCE = 0.05


def failures(rows: Iterable[Row]) -> list[str]:
    """One sentence for each way in which a row fails; empty where all is well."""
    return [f"{row.name}: {text}" for row in rows for text in (*_wrong(row), *_slower(row))]


def gate(entry: Entry, bound: float) -> Entry:
    """The entry without its times if its error is above the bound: no speed-up is shown for a wrong result."""
    if entry.failed or entry.error is None or entry.error <= bound:
        return entry
    return Entry(error=entry.error, failed=f"relative error {entry.error:.1e} is above {bound:.1e}")


def _wrong(row: Row) -> list[str]:
    return [f"{name}: {row.entries[name].failed}" for name in OURS if name in row.entries and row.entries[name].failed]


def _slower(row: Row) -> list[str]:
    """Sentences on our compiles against the judges; nothing where one was left alone and is stock code itself."""
    compiled = {way: row.entries[way] for way in COMPILED if way in row.entries}
    judges = {name: row.entries[name] for name in JUDGES if name in row.entries and not row.entries[name].failed}
    found = []
    for way, entry in compiled.items():
        if entry.failed or not sum((entry.sites or {}).values()):
            continue
        said = f"{way}: " if len(compiled) > 1 else ""
        for name, judge in judges.items():
            for what, tolerance, ours, theirs in (
                ("GPU", GPU_TOLERANCE, entry.gpu_us, judge.gpu_us),
                ("wall", WALL_TOLERANCE, entry.wall_us, judge.wall_us),
            ):
                if ours is not None and theirs is not None and ours > theirs * (1 + tolerance):
                    share = 100 * (ours / theirs - 1)
                    found.append(f"{said}{what} time {ours:.1f} us is {share:.0f} % above {name} ({theirs:.1f} us)")
    return found
