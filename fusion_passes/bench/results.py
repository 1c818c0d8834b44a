"""What a benchmark leaves behind: one row per case or model, one entry per contestant, and a small JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_passes import benchmarking

FORMAT = 1

# The contestants that are ours: the plain spelling compiled with the backend, the same of a model that is bound, and
# the op called eagerly.
COMPILED = ("fused", "bound")
OURS = (*COMPILED, "op")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One contestant on one row; times are medians in microseconds.

    Attributes:
        gpu_us: GPU time per call, from CUDA-graph replays; None where nothing was timed.
        wall_us: wall time per call without a graph.
        error: relative error (L2): against float64 for cases, against eager for models.
        sites: fused sites by name, for contestants that are compiled with our backend.
        failed: why there is no time, or why it does not count; "" where all is well.
        note: why nothing was fused, for a compile without a site; what could not be measured.
        first_call_s: seconds of the first call, compilation included; for models.
        kernels: GPU kernels per call; for models.
        peak_mb: peak of allocated GPU memory during a call, in MiB; for models.
    """

    gpu_us: float | None = None
    wall_us: float | None = None
    error: float | None = None
    sites: Mapping[str, int] | None = None
    failed: str = ""
    note: str = ""
    first_call_s: float | None = None
    kernels: int | None = None
    peak_mb: int | None = None

    def __post_init__(self) -> None:
        for name, digits in (("gpu_us", 2), ("wall_us", 1), ("first_call_s", 1)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, round(value, digits))
        if self.error is not None:
            object.__setattr__(self, "error", float(f"{self.error:.1e}"))


@dataclasses.dataclass(frozen=True)
class Row:
    """One case of an op, or one model at one size.

    Attributes:
        group: the op's or the model's name.
        case: shape in words.
        entries: by contestant, in the order in which they are shown.
        bytes, flops: of the case; 0 for models.
        floor_us: the least time that memory or the matrix units allow; None for models.
        bound: the largest error that counts as right.
        model: whether the row is a whole model.
        weights_mb: of a model, in MiB: a part of every peak.
    """

    group: str
    case: str
    entries: Mapping[str, Entry]
    bytes: int = 0
    flops: int = 0
    floor_us: float | None = None
    bound: float | None = None
    model: bool = False
    weights_mb: int = 0

    @property
    def name(self) -> str:
        return f"{self.group} {self.case}"

    def gpu_us(self, contestant: str) -> float | None:
        """The GPU time of a contestant whose result is right, else None."""
        entry = self.entries.get(contestant)
        return None if entry is None or entry.failed else entry.gpu_us

    @property
    def ours(self) -> str:
        """The contestant that stands for us: the compiled spelling where there is one, else the bare op."""
        return next((name for name in OURS if name in self.entries), OURS[0])


@dataclasses.dataclass(frozen=True)
class Results:
    """Rows, and what they depend on."""

    rows: tuple[Row, ...]
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    command: str = ""
    date: str = ""

    def write(self, path: Path) -> None:
        """Write JSON: a line for each row."""
        head = {"format": FORMAT, "date": self.date, "command": self.command, "environment": self.environment}
        lines = ",\n".join("  " + json.dumps(_plain(row)) for row in self.rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def first_line(problem: Exception) -> str:
    """What an entry says of an exception: its kind and the first line of its message."""
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0] if text else 'no message'}"[:200]


def taken_now(rows: tuple[Row, ...], environment: Mapping[str, Any] | None = None) -> Results:
    """Results measured by the command that runs now, in this environment unless another is given."""
    command = shlex.join(["python", "-m", "fusion_passes", *sys.argv[1:]])
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Results(rows, benchmarking.environment() if environment is None else environment, command, now)


def read(path: Path) -> Results:
    """Results from a JSON file.

    Raises:
        ValueError: the file is missing or is not what `Results.write` wrote; the message says which and why.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"its format is {found!r}, and this version reads {FORMAT!r}")
        rows = tuple(
            Row(**{**row, "entries": {name: Entry(**entry) for name, entry in row["entries"].items()}})
            for row in data["rows"]
        )
        return Results(rows, data["environment"], data["command"], data["date"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no benchmark results: {_words(error)}") from error


def _words(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _plain(row: Row) -> dict[str, Any]:
    """A row as JSON, without the fields that say nothing."""
    data = {field.name: getattr(row, field.name) for field in dataclasses.fields(Row)}
    data["entries"] = {name: _said(dataclasses.asdict(entry)) for name, entry in row.entries.items()}
    return {name: value for name, value in _said(data).items() if value not in (0, False) or name == "floor_us"}


def _said(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if value is not None and value != ""}
