"""Every tuned configuration, compiled for GPUs that are not here: registers, spills, shared memory, access widths.

Bounds are ranges, since the assembler differs between versions of Triton.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.arch import TABLE, by_name
from fusion_passes.lowering import Launch, Target
from fusion_passes.ops.gate_cumsum import TABLE as TUNED
from fusion_passes.ops.gate_cumsum import plan
from fusion_passes.plans import operand_of
from tests.support import sass

pytest.importorskip("triton.backends.nvidia")


def launch_of(arch: str, heads: int, channels: int, tokens: int, layout: str, forced: str = "") -> Launch:
    raw = torch.empty(1, tokens, 1, heads, channels, dtype=torch.bfloat16, device="meta")
    a_log = torch.empty(1, heads, 1, device="meta").expand(1, heads, channels)
    bias = torch.empty(1, heads, channels, device="meta")
    args = (raw, a_log, bias, -(-tokens // 64), 64, None, 1.0, 1.0, 20.0, False, layout, None, None)
    with tuning.overriding(**({"gate_cumsum": forced} if forced else {})):
        return plan(Target(by_name(arch), int), *map(operand_of, args))


def sizes(arch: str, shape_class: str) -> list[int]:
    """One number of tokens for each entry of the table that serves a class on an architecture."""
    heads = 32
    lanes = heads * (128 if shape_class == "channel" else 1)
    rows = TUNED.entries.get(arch, {}).get(shape_class) or TUNED.entries["default"][shape_class]
    bounds = [row["up_to"] for row in rows]
    found = []
    for index, bound in enumerate(bounds):
        smallest = 64 if index == 0 else bounds[index - 1] // lanes + 64
        found.append(smallest if bound is None else min(max(smallest, 64), bound // lanes))
    return found


def tuned_launches() -> list[tuple[str, str, Launch]]:
    """Each distinct configuration per architecture once."""
    found: dict[tuple[object, ...], tuple[str, str, Launch]] = {}
    classes = {"channel": (32, 128, "bhnck"), "head": (32, 1, "bnchk"), "head_transposed": (32, 1, "bhnck")}
    for arch in TABLE:
        for name, (heads, channels, layout) in classes.items():
            for tokens in sizes(arch, name):
                launch = launch_of(arch, heads, channels, tokens, layout)
                key = (arch, name, *(launch.args[p] for p in ("ROWS", "LANES", "SERIAL")), launch.num_warps)
                found.setdefault(key, (arch, name, launch))
    return list(found.values())


@pytest.mark.parametrize("arch, shape_class, launch", [pytest.param(*c, id="-".join(c[:2])) for c in tuned_launches()])
def test_tuned_configurations(arch: str, shape_class: str, launch: Launch, tmp_path: Path) -> None:
    limits = TABLE[arch]
    binary = sass.compile_launch(launch, arch, tmp_path)
    threads = launch.num_warps * limits.warp_size
    assert binary.spilled == 0
    assert binary.shared <= limits.shared_memory
    # Enough blocks fit on a multiprocessor to keep 20 warps in flight.
    assert binary.registers <= 100
    if arch.startswith("sm_") and shape_class == "channel" and launch.args["SERIAL"]:
        # A full and a masked copy of the code: all channels of a thread in one access, a barrier or two per scan.
        lanes = min(4, launch.args["CHUNK"] // launch.args["ROWS"] * launch.args["LANES"] // threads)
        accesses = 2 * launch.args["CHUNK"] * launch.args["LANES"] // (lanes * threads)
        stored, loaded = {4: (r"\.128", r"\.64"), 2: (r"\.64", "")}[lanes]
        assert binary.count(rf"STG\.E(\.EF)?(\.ENL2)?{stored}") == binary.count("STG") == accesses
        assert binary.count(rf"LDG\.E(\.EF)?(\.ENL2)?{loaded}") >= accesses
        assert binary.count("BAR") <= 4


def test_the_budget_of_instructions(tmp_path: Path) -> None:
    """Memory stays the bound as long as an element takes fewer than about 30 instructions."""
    launch = launch_of("sm_90", 32, 128, 4096, "bhnck", "rows=8,lanes=128,warps=8,serial=1")
    binary = sass.compile_launch(launch, "sm_90", tmp_path)
    assert sum(binary.instructions.values()) / (2 * 64 * 128 / 256) <= 26
    assert binary.registers <= 64, "four blocks on a multiprocessor"


def test_addresses_are_computed_once_per_row_at_most(tmp_path: Path) -> None:
    launch = launch_of("sm_90", 32, 128, 4096, "bnchk", "rows=8,lanes=128,warps=8,serial=1")
    binary = sass.compile_launch(launch, "sm_90", tmp_path)
    integer = binary.count("IADD3|IMAD|LEA|SHF.R")
    assert integer <= 2 * 8 + 140, binary.instructions


def test_packed_sequences_compile(tmp_path: Path) -> None:
    raw = torch.empty(1, 4096, 1, 32, 128, dtype=torch.bfloat16, device="meta")
    a_log = torch.empty(1, 32, 1, device="meta").expand(1, 32, 128)
    bounds = torch.empty(9, dtype=torch.int32, device="meta")
    for indices in (None, torch.empty(70, 2, dtype=torch.int32, device="meta")):
        args = (raw, a_log, None, 1, 64, -5.0, 1.0, 1.0, 20.0, False, "bnchk", bounds, indices)
        launch = plan(Target(by_name("sm_90"), int), *map(operand_of, args))
        binary = sass.compile_launch(launch, "sm_90", tmp_path)
        assert binary.spilled == 0 and binary.registers <= 128
