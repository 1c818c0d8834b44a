"""`rotate_pairs_kernel` compiled for GPUs that are not here: registers, spills, access widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusion_passes.arch import TABLE, by_name
from fusion_passes.lowering import Launch, Target
from fusion_passes.ops.rotate_pairs import plan
from fusion_passes.plans import operand_of
from tests.support import sass
from tests.support.rotate_pairs import PAIRINGS

pytest.importorskip("triton.backends.nvidia")


def launch_of(
    arch: str, pairing: str, *, tokens: int = 2048, channels: int = 64, dtype: torch.dtype = torch.bfloat16,
    factors: torch.dtype = torch.float32,
) -> Launch:  # fmt: skip
    """The launch that rotates the first channels of [T, 64, 128]."""
    pairs = PAIRINGS[pairing](torch.empty(1, tokens, 64, 128, dtype=dtype, device="meta"), channels)
    cos = torch.empty(1, tokens, 1, 1, channels // 2, dtype=factors, device="meta")
    return plan(Target(by_name(arch), int), operand_of(pairs), operand_of(cos), operand_of(cos))


@pytest.mark.parametrize("arch", TABLE)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_registers_and_widths(arch: str, pairing: str, tmp_path: Path) -> None:
    binary = sass.compile_launch(launch_of(arch, pairing), arch, tmp_path)
    assert binary.spilled == 0 and binary.registers <= 128
    wide = binary.count(r"STG\.E(\.\w+)*\.(64|128)|global_store_dwordx[24]")
    assert wide == binary.count(r"STG|global_store") > 0


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_single_token(pairing: str, tmp_path: Path) -> None:
    assert sass.compile_launch(launch_of("sm_90", pairing, tokens=1), "sm_90", tmp_path).spilled == 0


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(
    "dtype, factors, channels",
    [(torch.float32, torch.float32, 48), (torch.float16, torch.bfloat16, 128)],
)
def test_widths_and_dtypes(
    pairing: str, dtype: torch.dtype, factors: torch.dtype, channels: int, tmp_path: Path
) -> None:
    launch = launch_of("sm_90", pairing, channels=channels, dtype=dtype, factors=factors)
    binary = sass.compile_launch(launch, "sm_90", tmp_path)
    assert binary.spilled == 0 and binary.registers <= 160
