"""The report as one self-contained HTML page: no script, no resource from elsewhere, in light and dark."""

from __future__ import annotations

import html
import linecache
from collections import Counter
from collections.abc import Sequence

from fusion_passes import drawing
from fusion_passes.records import Outcome, Record
from fusion_passes.reports import TITLES, Report, in_bytes, saved, short
from fusion_passes.sketches import Drawing, Sketch

# Characters of drawings after which further sites are told in words alone.
BUDGET = 1_200_000

_WHY: dict[Outcome, str] = {"fused": "Found", "refused": "Why not", "near_miss": "Why not"}
_LEGEND = (
    '<p class="legend"><span class="input">rounded</span> what is read and what results, '
    '<span class="step">square</span> an operator, <span class="fold">dashed</span> several operators in one box, '
    '<span class="fused">filled</span> a fused op. Arrows lead from a value to what reads it. '
    "A box under the pointer says how the graph calls it.</p>"
)


def render(report: Report) -> str:
    """The page as text."""
    body = ["<header><h1>What fusion_passes did</h1>", _summary(report), "</header>"]
    room = BUDGET
    if report.drawings:
        body.append(_LEGEND)
    for outcome, title in TITLES.items():
        groups = _groups(report, outcome)
        if not groups:
            continue
        head, _, rest = title.partition(":")
        note = f" <small>{_text(rest.strip())}</small>" if rest else ""
        body.append(f'<section class="{outcome}"><h2>{head} {sum(map(len, groups))}{note}</h2>')
        for number, group in enumerate(groups):
            pictures = _pictures(group[0], report.drawings.get(group[0]), opened=outcome == "fused" or number == 0)
            if len(pictures) > room:
                pictures = "<p class=note>Not drawn, to keep the page small.</p>"
            room -= len(pictures)
            body.append(_article(group, report.drawings.get(group[0]), pictures))
        body.append("</section>")
    body += [f"<p class=note>{_text(note)}</p>" for note in report.notes]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>fusion_passes report</title><style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _text(text: str) -> str:
    return html.escape(text)


def _groups(report: Report, outcome: Outcome) -> list[list[Record]]:
    """Records that a reader cannot tell apart, such as those of equal layers."""
    groups: dict[object, list[Record]] = {}
    for record in report.records:
        if record.outcome == outcome:
            picture = report.drawings.get(record)
            where = record.source or record.node
            groups.setdefault((record.fusion, record.reason, where, picture), []).append(record)
    return list(groups.values())


def _summary(report: Report) -> str:
    """Sites of each fusion, by what became of them."""
    if not report.records:
        return "<p>No candidate for a fusion was found.</p>"
    counts = Counter((record.fusion, record.outcome) for record in report.records)
    rows = []
    for name in sorted({record.fusion for record in report.records}):
        own = [record for record in report.fused if record.fusion == name]
        cells = "".join(f"<td>{counts[name, outcome] or '–'}</td>" for outcome in TITLES)
        rows.append(f'<tr><th scope="row">{_text(name)}</th>{cells}<td>{saved(own) or "–"}</td></tr>')
    heads = ("fusion", "fused", "refused", "near misses", "saves per call (estimate)")
    columns = "".join(f'<th scope="col">{column}</th>' for column in heads)
    table = f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide" tabindex="0" role="group" aria-label="sites of each fusion">{table}</div>'


def _article(group: Sequence[Record], picture: Drawing | None, pictures: str) -> str:
    record = group[0]
    times = f" ×{len(group)}" if len(group) > 1 else ""
    rows = [(_WHY[record.outcome], _text(record.reason))]
    if record.hint:
        rows.append(("What would help", _text(record.hint)))
    if saved([record]):
        rows.append(("Saves per call", f"{saved([record])} <small>estimate{', each' if times else ''}</small>"))
    if picture is not None and picture.after is not None:
        before, after = picture.before.operators, picture.after.operators
        rows.append(("Operators", f"{before:,} before, {after:,} after, beside views"))
    if picture is not None and picture.held is not None:
        amount = f"{in_bytes(picture.held)} at once as the model is written <small>estimate</small>"
        rows.append(("Intermediates", amount))
    facts = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f"<article><h3>{_text(record.fusion)}{times}</h3>{_where(record)}<dl>{facts}</dl>{pictures}</article>"


def _where(record: Record) -> str:
    """The line of the model's code, with its text where the file can still be read."""
    if not record.source:
        return f"<p class=where>at {_text(record.node)} in the graph; its line of code is not known</p>"
    path, _, line = record.source.rpartition(":")
    code = linecache.getline(path, int(line)).strip() if line.isdigit() else ""
    place = f'<p class=where title="{_text(record.source)}">{_text(short(record.source))}</p>'
    return place + (f"<pre><code>{_text(code)}</code></pre>" if code else "")


def _pictures(record: Record, picture: Drawing | None, opened: bool) -> str:
    if picture is None:
        return ""
    if picture.after is not None:
        parts = [_figure("Before", picture.before, record), _figure("After", picture.after, record)]
        name = "Before and after"
    elif record.outcome == "refused":
        parts, name = [_figure("Left as it is", picture.before, record)], "The operators that were left alone"
    else:
        parts, name = [_figure("Around it", picture.before, record)], "Where the search started, and what leads there"
    shown = " open" if opened else ""
    return f"<details{shown}><summary>{name}</summary><div class=pair>{''.join(parts)}</div></details>"


def _figure(name: str, sketch: Sketch, record: Record) -> str:
    count = f"{sketch.operators:,} operator{'' if sketch.operators == 1 else 's'}"
    if sketch.views:
        count += f" and {sketch.views:,} view{'' if sketch.views == 1 else 's'}"
    picture = drawing.svg(sketch, f"{record.fusion}, {name.lower()}: {count}")
    label = _text(f"{record.fusion}, {name.lower()}")
    scroll = f'<div class=scroll tabindex="0" role="group" aria-label="{label}">{picture}</div>'
    return f"<figure><figcaption>{name} <small>{count}</small></figcaption>{scroll}</figure>"


_STYLE = """
:root{color-scheme:light dark; --page:#fff; --text:#1f2328; --faint:#59636e; --line:#d1d9e0; --card:#f6f8fa;
  --box:#fff; --good:#1a7f37; --good-box:#dafbe1; --no:#9a6700; --in:#0969da; --in-box:#ddf4ff}
@media(prefers-color-scheme:dark){:root{--page:#0d1117; --text:#e6edf3; --faint:#9198a1; --line:#3d444d;
  --card:#151b23; --box:#21262d; --good:#3fb950; --good-box:#12361f; --no:#d29922; --in:#58a6ff; --in-box:#10243e} }
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif; color:var(--text); background:var(--page); max-width:80rem; margin:2rem auto;
  padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 1rem}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
h3{font:600 1rem ui-monospace,monospace;margin:0}
small,.note,.legend,figcaption,dt,thead th{color:var(--faint)}
small{font-weight:400;font-size:.85em}
.fused>h2{color:var(--good)}
.refused>h2{color:var(--no)}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.35rem .8rem .35rem 0;border-bottom:1px solid var(--line)}
th{font-weight:400}
tbody th{font-family:ui-monospace,monospace}
article{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1rem;margin:0 0 1rem}
.where{font:13px/1.5 ui-monospace,monospace;color:var(--faint);margin:.1rem 0;overflow-wrap:anywhere}
pre{background:var(--page); border:1px solid var(--line); border-radius:4px; padding:.4rem .6rem; margin:.4rem 0;
  overflow:auto; font:13px/1.5 ui-monospace,monospace}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem; margin:.6rem 0}
dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer}
.pair{display:flex;flex-wrap:wrap;gap:1rem 2rem;align-items:flex-start;margin-top:.6rem}
figure{margin:0;max-width:100%}
figcaption{margin-bottom:.3rem}
.scroll,.wide{overflow:auto;max-width:100%}
svg{display:block}
svg text{font:11px system-ui,sans-serif;text-anchor:middle;fill:var(--text)}
svg .title{font-weight:600}
rect{fill:var(--box);stroke:var(--line)}
.input rect,.result rect,.constant rect{fill:var(--in-box);stroke:var(--in)}
.constant rect{stroke-dasharray:2 2}
.fold rect{stroke:var(--faint);stroke-dasharray:5 3}
g.fused rect{fill:var(--good-box);stroke:var(--good);stroke-width:2}
.edge{fill:none;stroke:var(--faint);opacity:.6}
.head{fill:var(--faint)}
.legend{font-size:.9em}
.legend span{border:1px solid var(--line);padding:0 .4em;margin-left:.3em; color:var(--text)}
.legend .input{border-color:var(--in);background:var(--in-box);border-radius:9px}
.legend .fold{border:1px dashed var(--faint)}
.legend .fused{border-color:var(--good);background:var(--good-box)}
@media(max-width:40rem){dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}th,td{padding-right:.4rem}}
@media print{details>*{display:block}}
"""
