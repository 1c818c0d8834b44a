"""Runs tests of every kernel under compute-sanitizer: memcheck (bad accesses) and racecheck (races in shared memory).

    PYTHONPATH=. python tests/gpu/sanitize.py --json sanitizer.json

Each op and tool is a process of its own. Tensors are allocations of their own there, so that an access next to one is
seen, and outputs of the ops' tests start as NaN. Only our kernels are instrumented, not the float64 references.
Prints a line per process and fails where a tool found something, or nothing in a kernel that is wrong on purpose.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from fusion_passes import benchmarking

# Which tests of an op's file are run: every kernel, ragged sizes, strides, masks; no large tensors, no compiles.
TESTS = {
    "gate_cumsum": "dtypes_and_forms or views or packed_sequences",
    "qkv_split": "widths_and_repeats or test_dtypes",
    "mla_kv_pack": "(widths_and_dtypes or test_strides or uncast or empty) and not spellings",
    "delta_rule_intra": "test_widths and (16-48 or 96-240)",
    "chunk_delta_rule": "gates_inside or packed_sequences",
    "index_score": "(product_per_head and 64-12-96 and keep) or (test_layouts and (bst or tbs))",
    "head_gate": "test_forms and (16- or 300-) and not split_x",
    "topk_mask": "test_regimes and (random or few_values or causal) or test_layouts",
    "redundant_copy": "test_kernel and dtype0 and (by_rows or by_tokens)",
}
# What the names of an op's kernels have in common, where that is not the op's name.
KERNELS = {"chunk_delta_rule": "delta_rule_", "redundant_copy": "rotate_pairs"}
PLANTED = "planted_kernel"
TOOLS = {
    "memcheck": r"ERROR SUMMARY: (\d+) error",
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazard",
}


@triton.jit
def planted_kernel(x_ptr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr + (1 << 20), 1.0)


def check(op: str, tool: str, limit: float) -> dict[str, Any]:
    """The result of one tool on one op's tests: what it found, or why that is not known."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", f"tests/gpu/test_{op}.py", "-k", TESTS.get(op, "")]
    command = [
        "compute-sanitizer", "--tool", tool, "--target-processes", "application-only", "--print-limit", "20",
        "--kernel-name", f"kernel_substring={KERNELS.get(op, op)}",
        sys.executable, *([__file__, "--plant"] if op == PLANTED else pytest),
    ]  # fmt: skip
    start = time.perf_counter()
    row: dict[str, Any] = {"op": op, "tool": tool}
    text = _output(command, limit)
    if text is None:
        return {**row, "failed": f"no result within {limit:.0f} s"}
    row["seconds"] = round(time.perf_counter() - start)
    found, passed = re.search(TOOLS[tool], text), re.search(r"(\d+) passed", text)
    if op == PLANTED:
        return {**row, "found": int(found[1])} if found and int(found[1]) else {**row, "failed": text[-2000:]}
    if found is None or passed is None or " failed" in text:
        return {**row, "failed": text[-2000:]}
    findings = [line for line in text.splitlines() if line.startswith("=========")][:40]
    return {**row, "tests": int(passed[1]), "found": int(found[1]), **({"log": findings} if int(found[1]) else {})}


def _output(command: list[str], limit: float) -> str | None:
    """What a process prints; `None` if it needs more than `limit` seconds: it and its children are ended."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        return process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--plant", action="store_true", help="only launch the kernel that is wrong on purpose")
    parser.add_argument("--op", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one process")
    options = parser.parse_args()
    if options.plant:
        planted_kernel[(1,)](torch.zeros(4, device="cuda"))
        torch.cuda.synchronize()
        return
    if options.json is None:
        parser.error("the following arguments are required: --json")
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True).stdout
    number = re.search(r"Version (\S+)", version)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        work = [pool.submit(check, PLANTED, "memcheck", options.limit)]
        work += [pool.submit(check, op, tool, options.limit) for tool in TOOLS for op in options.op]
        for done in as_completed(work):
            row = {**done.result(), "compute_sanitizer": number[1] if number else "unknown"}
            rows.append(row)
            done_in = f"{row.get('tests', 'no')} tests, {row.get('found')} found in {row.get('seconds')} s"
            outcome = row.get("failed", done_in)
            print(f"{row['op']:18s} {row['tool']:10s} {outcome}", flush=True)
            benchmarking.write_json(options.json, sorted(rows, key=lambda row: (row["op"], row["tool"])))
    sys.exit(any("failed" in row or (row["found"] and row["op"] != PLANTED) for row in rows))


if __name__ == "__main__":
    main()
