"""Runs tests of every kernel under compute-sanitizer: memcheck (bad accesses) and racecheck (races in shared memory).

    PYTHONPATH=. python tests/gpu/sanitize.py --json sanitizer.json

Each op and tool is a process of its own. Tensors are allocations of their own there, so that an access next to one is
seen, and outputs of the ops' tests start as NaN. Prints a line per process and fails where a tool found something.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fusion_passes import benchmarking

# Which tests of an op's file are run: every kernel, ragged sizes, strides, masks; no large tensors, no compiles.
TESTS = {
    "gate_cumsum": "dtypes_and_forms or views or packed_sequences",
    "qkv_split": "widths_and_repeats or test_dtypes",
    "mla_kv_pack": "widths_and_dtypes or test_strides or uncast or empty",
    "delta_rule_intra": "test_widths and (16-48 or 96-240)",
    "chunk_delta_rule": "gates_inside or packed_sequences",
    "index_score": "(product_per_head and 64-12-96 and keep) or (test_layouts and (bst or tbs))",
    "head_gate": "test_forms and (16- or 300-) and not split_x",
    "redundant_copy": "test_kernel and dtype0 and (by_rows or by_tokens)",
}
TOOLS = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
}


def check(op: str, tool: str, limit: float) -> dict[str, Any]:
    """The result of one tool on one op's tests: what it found, or why that is not known."""
    command = [
        "compute-sanitizer", "--tool", tool, "--target-processes", "application-only", "--print-limit", "20",
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", f"tests/gpu/test_{op}.py",
        "-k", TESTS[op],
    ]  # fmt: skip
    start = time.perf_counter()
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    row: dict[str, Any] = {"op": op, "tool": tool}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"no result within {limit:.0f} s"}
    row["seconds"] = round(time.perf_counter() - start)
    found, passed = re.search(TOOLS[tool], text), re.search(r"(\d+) passed", text)
    if found is None or passed is None or " failed" in text:
        return {**row, "failed": text[-2000:]}
    findings = [line for line in text.splitlines() if line.startswith("=========")][:40]
    return {**row, "tests": int(passed[1]), "found": int(found[1]), **({"log": findings} if int(found[1]) else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for all results")
    parser.add_argument("--op", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one process")
    options = parser.parse_args()
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True).stdout
    number = re.search(r"Version (\S+)", version)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        work = [pool.submit(check, op, tool, options.limit) for tool in TOOLS for op in options.op]
        for done in as_completed(work):
            row = {**done.result(), "compute_sanitizer": number[1] if number else "unknown"}
            rows.append(row)
            outcome = row.get("failed", f"{row.get('tests')} tests, {row.get('found')} found in {row.get('seconds')} s")
            print(f"{row['op']:18s} {row['tool']:10s} {outcome}", flush=True)
            benchmarking.write_json(options.json, sorted(rows, key=lambda row: (row["op"], row["tool"])))
    sys.exit(any("failed" in row or row["found"] for row in rows))


if __name__ == "__main__":
    main()
