"""Every tuned configuration of `topk_mask`, compiled for GPUs that are not here: registers, spills, access widths.

Bounds are ranges, since the assembler differs between versions of Triton.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.arch import TABLE, by_name
from fusion_passes.lowering import Launch, Target
from fusion_passes.ops.topk_mask import LONGEST, plan
from fusion_passes.plans import operand_of
from tests.support import sass

pytest.importorskip("triton.backends.nvidia")

ARCHES = ["sm_80", "sm_90", "sm_100", "gfx942"]
LENGTHS = [1024, 2048, 8192, 16384, LONGEST]


def launch_of(
    arch: str, length: int, dtype: torch.dtype = torch.float32, *, largest: bool = True, inlined: bool = True,
    forced: str = "",
) -> Launch:  # fmt: skip
    scores = operand_of(torch.empty(2048, length, dtype=dtype, device="meta"))
    with tuning.overriding(**({"topk_mask": forced} if forced else {})):
        return plan(Target(by_name(arch), int, inlined), scores, length // 4, largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("arch", ARCHES)
def test_tuned_configurations(arch: str, length: int, dtype: torch.dtype, tmp_path: Path) -> None:
    launch = launch_of(arch, length, dtype)
    binary = sass.compile_launch(launch, arch, tmp_path)
    held = launch.args["BLOCK"] // (launch.num_warps * TABLE[arch].warp_size)
    assert binary.spilled == 0
    # The numbers of a thread, and no second copy of them.
    assert binary.registers <= min(128, 40 + 2 * held)
    # A sum over the warps, and no prefix sums or exchanges.
    assert binary.shared <= 256
    # A row is read in vectors of 16 bytes, or of as many as there are for a thread.
    loads = binary.count(r"LDG|(global|buffer)_load")
    wide = binary.count(r"LDG\.E(\.\w+)*\.(64|128)|(global|buffer)_load_dwordx[24]")
    assert wide == loads > 0


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1500, 3072, 20000, LONGEST])
def test_lengths_that_are_known_at_run_time(length: int, dtype: torch.dtype, arch: str, tmp_path: Path) -> None:
    """As eager calls have them, with rows that do not fill their block."""
    for largest in (True, False):
        launch = launch_of(arch, length, dtype, largest=largest, inlined=False)
        assert launch.args["LENGTH"] == launch.args["K"] == -1
        assert sass.compile_launch(launch, arch, tmp_path).spilled == 0


@pytest.mark.parametrize("length", [1, 2, 33, 100])
def test_short_rows(length: int, tmp_path: Path) -> None:
    """Fewer entries than a warp has threads."""
    binary = sass.compile_launch(launch_of("sm_90", length), "sm_90", tmp_path)
    assert binary.spilled == 0 and binary.registers <= 64


@pytest.mark.parametrize("warps", [4, 8, 16, 32])
def test_warps(warps: int, tmp_path: Path) -> None:
    """Up to 64 entries of a thread stay in registers, whatever the number of threads."""
    for length in (2048, 8192, LONGEST):
        if length <= 64 * 32 * warps:
            launch = launch_of("sm_90", length, forced=f"warps={warps}")
            assert sass.compile_launch(launch, "sm_90", tmp_path).spilled == 0
