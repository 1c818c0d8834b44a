"""Two results of the same benchmark: what became slower, faster, less exact or is no longer fused."""

from __future__ import annotations

import dataclasses

from fusion_passes.bench.results import OURS, Entry, Results, Row

# An error this much larger than before is a regression; smaller changes come with another order of summation.
ERROR_FACTOR = 2.0

# Quantity, unit, smallest difference that counts, and how many tolerances it may move: wall time is noisier.
_QUANTITIES = (("gpu_us", "us GPU", 0.1, 1), ("wall_us", "us wall", 2.0, 2), ("peak_mb", "MiB peak", 16, 1))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Sentences on what changed, and remarks on what could not be compared."""

    regressions: tuple[str, ...]
    improvements: tuple[str, ...]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        parts = [("Slower or worse", self.regressions), ("Faster", self.improvements), ("Remarks", self.remarks)]
        blocks = ["\n  ".join([f"{title} ({len(lines)})", *lines]) for title, lines in parts if lines]
        return "\n\n".join(blocks) or "no difference beyond the tolerance"


def compare(old: Results, new: Results, tolerance: float = 0.05) -> Comparison:
    """What our contestants (the fused compile and the bare op) do in `new` that they did not in `old`.

    Args:
        old: the results to hold on to.
        new: the results to judge.
        tolerance: share of a GPU time or of a peak of memory that may be lost without a word; twice that of a wall
            time.

    Raises:
        ValueError: the two were taken on different GPUs, or one with cold inputs and one with warm ones, or they have
            no row in common.
    """
    gpus = [results.environment.get("gpu", "an unknown GPU") for results in (old, new)]
    if gpus[0] != gpus[1]:
        raise ValueError(f"times of different GPUs do not compare: {gpus[0]} and {gpus[1]}")
    inputs = [results.environment.get("inputs", "cold") for results in (old, new)]
    if inputs[0] != inputs[1]:
        raise ValueError(f"times of {inputs[0]} and of {inputs[1]} inputs do not compare")
    before, after = ({row.name: row for row in results.rows} for results in (old, new))
    common = [name for name in before if name in after]
    if not common:
        raise ValueError("the two results have no case in common")
    regressions: list[str] = []
    improvements: list[str] = []
    for name in common:
        for contestant in OURS:
            pair = before[name].entries.get(contestant), after[name].entries.get(contestant)
            if pair[0] is not None and pair[1] is not None:
                worse, better = _entries(pair[0], pair[1], tolerance)
                regressions += [f"{name}, {contestant}: {text}" for text in worse]
                improvements += [f"{name}, {contestant}: {text}" for text in better]
    remarks = [f"{name}: only in the old results" for name in before if name not in after]
    remarks += [f"{name}: only in the new results" for name in after if name not in before]
    remarks += [
        f"{what}: {old.environment.get(what)} before, {new.environment.get(what)} now"
        for what in ("torch", "triton", "driver")
        if old.environment.get(what) != new.environment.get(what)
    ]
    remarks += [text for name in common for text in _drift(before[name], after[name], tolerance)]
    return Comparison(tuple(regressions), tuple(improvements), tuple(remarks))


def _entries(old: Entry, new: Entry, tolerance: float) -> tuple[list[str], list[str]]:
    """What is worse and what is better about one contestant."""
    worse: list[str] = []
    better: list[str] = []
    if new.failed and not old.failed:
        worse.append(f"fails now: {new.failed}")
    for field, unit, least, factor in _QUANTITIES:
        was, now = getattr(old, field), getattr(new, field)
        if was is None or now is None or abs(now - was) <= max(least, factor * tolerance * was):
            continue
        (worse if now > was else better).append(f"{was:g} -> {now:g} {unit} ({100 * (now / was - 1):+.0f} %)")
    if old.error is not None and new.error is not None and new.error > ERROR_FACTOR * old.error:
        worse.append(f"error {old.error:.1e} -> {new.error:.1e}")
    for name, count in (old.sites or {}).items():
        now = (new.sites or {}).get(name, 0)
        if now < count:
            worse.append(f"{name} is fused at {now} places, it was at {count}")
    return worse, better


def _drift(old: Row, new: Row, tolerance: float) -> list[str]:
    """A remark where stock's own time moved: then the machine, not we, may be what changed."""
    was, now = old.gpu_us("stock"), new.gpu_us("stock")
    if was is None or now is None or abs(now - was) <= max(0.1, tolerance * was):
        return []
    return [f"{old.name}: stock moved too, {was:g} -> {now:g} us GPU"]
