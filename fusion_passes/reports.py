"""The account of what was and was not fused, as text, JSON or HTML."""

from __future__ import annotations

import dataclasses
import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from fusion_passes import expectation, records
from fusion_passes.records import Outcome, Record

_TITLES: dict[Outcome, str] = {
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
    """

    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()

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
        for outcome, title in _TITLES.items():
            group = Counter(self._of(outcome))
            if group:
                lines += ["", title, *_table(group)]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes])

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
        """Write the report as one self-contained HTML page and return its path."""
        body = [f"<h1>fusion_passes</h1><p class=total>Fused: <b>{html.escape(_total(self))}</b></p>"]
        for outcome, title in _TITLES.items():
            group = Counter(self._of(outcome))
            if group:
                head, _, rest = title.partition(":")
                note = f"<small>{html.escape(rest.strip())}</small>" if rest else ""
                rows = "".join(_html_row(record, count) for record, count in group.items())
                body.append(f'<h2 class="{outcome}">{head} {group.total()} {note}</h2>')
                columns = "".join(f"<th>{column}</th>" for column in _COLUMNS[outcome])
                body.append(f"<table><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table>")
        if not self.records:
            body.append("<p>No candidate for a fusion was found.</p>")
        body += [f"<p class=note>{html.escape(note)}</p>" for note in self.notes]
        page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fusion_passes report</title>{_STYLE}'
        target = Path(path)
        target.write_text(page + "<body>" + "".join(body) + "</body></html>\n", encoding="utf-8")
        return target


class _Counts(dict[str, int]):
    """Counts in which a fusion without a site reads as 0."""

    def __missing__(self, key: str) -> int:
        return 0


def report() -> Report:
    """What all compiles of this process did so far, whether compiled now or taken from a warm cache."""
    return Report(tuple(records.recall()))


def saved(record: Record) -> str:
    """The estimated savings of a record in words, or "" where none were estimated."""
    parts = []
    if record.saved_bytes is not None:
        parts.append(_bytes(record.saved_bytes))
    if record.saved_launches:
        parts.append(f"{record.saved_launches} launch{'es' if record.saved_launches > 1 else ''}")
    return ", ".join(parts)


def _bytes(count: int) -> str:
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
        lines.append(f"  {record.fusion}{times}  {_short(record.source) or record.node}")
        lines.append(f"      {record.reason}" + (f"; saves {saved(record)} per call" if saved(record) else ""))
    return lines


def _short(source: str) -> str:
    """The last three parts of a source path: enough to find it, short enough to read."""
    return "/".join(source.replace("\\", "/").split("/")[-3:])


def _html_row(record: Record, count: int) -> str:
    """One line of the table of the record's outcome: fused sites have a last cell with the savings."""
    cells = [record.fusion + (f" x{count}" if count > 1 else ""), _short(record.source) or record.node, record.reason]
    if record.outcome == "fused":
        cells.append(saved(record))
    name, where, *others = map(html.escape, cells)
    row = f'<td>{name}</td><td class=where title="{html.escape(record.source)}">{where}</td>'
    return f"<tr>{row}{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"


_COLUMNS: dict[Outcome, tuple[str, ...]] = {
    "fused": ("fusion", "where", "what", "saved per call"),
    "refused": ("fusion", "where", "why"),
    "near_miss": ("fusion", "where", "why not"),
}

_STYLE = (
    "<style>:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;"
    "padding:0 1rem}h1{font-size:1.4rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .4rem}small,.note,th{opacity:.7}"
    "small{font-weight:400;margin-left:.5rem}table{border-collapse:collapse;width:100%;table-layout:fixed}"
    "th,td{text-align:left;vertical-align:top;padding:.4rem .8rem .4rem 0;border-bottom:1px solid #8884;"
    "overflow-wrap:anywhere}th{font-weight:400;font-size:13px}th:nth-child(1){width:10rem}th:nth-child(2){width:38%}"
    "th:nth-child(4){width:11rem}.where{font:12px/1.8 ui-monospace,monospace}h2.fused{color:#1a7f37}"
    "h2.refused{color:#9a6700}</style>"
)
