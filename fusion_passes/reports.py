"""The account of what was and was not fused, as text, JSON or HTML."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_passes import expectation, records, styled
from fusion_passes.records import Outcome, Record
from fusion_passes.sketches import Drawing

TITLES: dict[Outcome, str] = {
    "fused": "Fused",
    "refused": "Refused: the subgraph means the same, but was left alone",
    "near_miss": "Near misses: looked at and found to be something else",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compile, or all compiles of this process, did.

    Attributes:
        records: every candidate site.
        notes: remarks on the whole, such as the GPU that was assumed or a graph break.
        drawings: what the HTML page draws of a record. Only `explain` takes them; they are no part of the JSON.
    """

    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()
    drawings: Mapping[Record, Drawing] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """Number of fused sites by the name of the fusion; names without a site are absent and count as 0."""
        return _Counts(Counter(record.fusion for record in self.fused))

    @property
    def fused(self) -> list[Record]:
        """Sites that were replaced by a fused op."""
        return self._of("fused")

    @property
    def refusals(self) -> list[Record]:
        """Sites that mean what a fusion computes and were left alone, with the reason."""
        return self._of("refused")

    @property
    def near_misses(self) -> list[Record]:
        """Anchors around which the graph computes something else, with the place where the likeness ends."""
        return self._of("near_miss")

    def expect(self, counts: Mapping[str, int]) -> Report:
        """Check the number of fused sites of some fusions, and return the report.

        Raises:
            ExpectationError: a count differs; the message holds the report.
        """
        complaint = expectation.complaint(counts, self.counts)
        if complaint:
            raise expectation.ExpectationError(f"{complaint}\n\n{self}")
        return self

    def _of(self, outcome: Outcome) -> list[Record]:
        return [record for record in self.records if record.outcome == outcome]

    def __str__(self) -> str:
        if not self.records:
            return "\n".join(["fusion_passes: no candidate for a fusion was found", *self.notes])
        lines = [f"fusion_passes: fused {_total(self)}"]
        for outcome, title in TITLES.items():
            group = Counter(self._of(outcome))
            if group:
                lines += ["", title, *_table(group)]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes])

    def __rich__(self) -> Any:
        """What `rich.print` shows: the same words, styled."""
        return styled.renderable(self)

    def show(self) -> None:
        """Print the report, with colours on a terminal where rich is installed."""
        styled.show(self)

    def to_json(self) -> str:
        """The report as a JSON object with the keys counts, fused, refusals, near_misses and notes."""
        data = {
            "counts": dict(self.counts),
            "fused": [dataclasses.asdict(r) for r in self.fused],
            "refusals": [dataclasses.asdict(r) for r in self.refusals],
            "near_misses": [dataclasses.asdict(r) for r in self.near_misses],
            "notes": list(self.notes),
        }
        return json.dumps(data, indent=2)

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one self-contained HTML page and return its path.

        Sites are drawn, as they are in the model and as they are compiled, in the reports of `explain`.
        """
        from fusion_passes import page

        target = Path(path)
        target.write_text(page.render(self), encoding="utf-8")
        return target


class _Counts(dict[str, int]):
    """Counts in which a fusion without a site reads as 0."""

    def __missing__(self, key: str) -> int:
        return 0


def report() -> Report:
    """What all compiles of this process did so far, whether compiled now or taken from a warm cache."""
    return Report(tuple(records.recall()))


def saved(records: Sequence[Record]) -> str:
    """The estimated savings of some records in words, or "" where none were estimated."""
    parts = []
    traffic = [record.saved_bytes for record in records if record.saved_bytes is not None]
    if traffic:
        parts.append(in_bytes(sum(traffic)))
    launches = sum(record.saved_launches or 0 for record in records)
    if launches:
        parts.append(f"{launches} launch{'es' if launches > 1 else ''}")
    return ", ".join(parts)


def in_bytes(count: int) -> str:
    """A number of bytes in words."""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B"


def _total(report: Report) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(report.counts.items())) or "nothing"


def _table(group: Iterable[Record] | Counter[Record]) -> list[str]:
    lines = []
    for record, count in Counter(group).items():
        times = f" x{count}" if count > 1 else ""
        lines.append(f"  {record.fusion}{times}  {short(record.source) or record.node}")
        savings = saved([record])
        lines.append(f"      {record.reason}" + (f"; saves {savings} per call" if savings else ""))
        if record.saved_memory:
            lines.append(f"      {in_bytes(record.saved_memory)} of intermediates at once are no longer in memory")
        if record.hint:
            lines.append(f"      what would help: {record.hint}")
    return lines


def short(source: str) -> str:
    """The last three parts of a source path: enough to find it, short enough to read."""
    return "/".join(source.replace("\\", "/").split("/")[-3:])
