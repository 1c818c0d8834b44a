"""The kernels of `delta_rule_intra`, compiled for GPUs that are not here: registers, spills, shared memory, widths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.arch import TABLE, by_name
from fusion_passes.lowering import Launch, Operand, Target
from fusion_passes.ops._delta_rule_intra_plan import plan
from fusion_passes.plans import operand_of
from tests.support import sass

pytest.importorskip("triton.backends.nvidia")

BOTH = pytest.mark.parametrize("per_channel", [False, True])


def launch_of(
    arch: str, per_channel: bool, *, pairs: bool = False, tokens: int = 4096, heads: tuple[int, int] = (16, 32),
    key: int = 128, value: int = 128, chunk: int = 64, dtype: torch.dtype = torch.bfloat16, columns: bool = False,
    launch: str = "",
) -> Launch:  # fmt: skip
    def operand(*shape: int, kind: torch.dtype = dtype) -> Operand:
        return operand_of(torch.empty(shape, dtype=kind, device="meta"))

    key_heads, value_heads = heads
    k = operand(1, tokens, key_heads, key)
    sums = operand(1, value_heads, tokens // chunk, chunk, *((key,) if per_channel else ()), kind=torch.float32)
    tensors: list[Any] = [k, operand(1, tokens, value_heads, value), sums, operand(1, tokens, value_heads)]
    with tuning.overriding(**({"delta_rule_intra": launch} if launch else {})):
        tensors += [k if pairs else None, 0.1, 1e-6, "u,w", columns, False, torch.float32]
        (only,) = plan(Target(by_name(arch), int), *tensors).launches
    return only


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], sass.Binary]:
    """The kernel that is launched on an H200, compiled once."""
    folder = tmp_path_factory.mktemp("hopper")
    return functools.cache(lambda per_channel: sass.compile_launch(launch_of("sm_90", per_channel), "sm_90", folder))


@BOTH
def test_hopper(hopper: Callable[[bool], sass.Binary], per_channel: bool) -> None:
    binary = hopper(per_channel)
    # Two tiles of 64 x 64 and a block of rows: with channels a few of the sums do not fit.
    assert binary.spilled <= (512 if per_channel else 0)
    assert 4 * binary.shared <= TABLE["sm_90"].shared_memory
    assert binary.count("HGMMA") > 0
    assert binary.count("STG") == binary.count(r"STG\.E\.128") > 0
    assert binary.count(r"LDG\.E\.\w*\.?128|LDG.*128") >= 24


@pytest.mark.parametrize("arch, per_channel", [("sm_89", True), ("sm_100", True), ("gfx942", False)])
def test_other_architectures(arch: str, per_channel: bool, tmp_path: Path) -> None:
    """One block of channels, which is all that is in shared memory at a time."""
    launch = launch_of(arch, per_channel, key=64, value=64)
    assert sass.compile_launch(launch, arch, tmp_path).shared <= TABLE[arch].shared_memory


def test_results_by_columns_are_stored_widely_as_well(tmp_path: Path) -> None:
    binary = sass.compile_launch(launch_of("sm_90", False, key=64, value=64, columns=True), "sm_90", tmp_path)
    assert binary.count(r"STG\.E\.128") > 0


def test_float32_fits(tmp_path: Path) -> None:
    launch = launch_of("sm_90", True, dtype=torch.float32, key=64, value=64)
    assert sass.compile_launch(launch, "sm_90", tmp_path).shared <= TABLE["sm_90"].shared_memory


def test_the_grid_covers_tiles_of_64_tokens() -> None:
    assert launch_of("sm_90", False).grid == (64 * 32,)
    assert launch_of("sm_90", False, chunk=16, tokens=80).grid == (2 * 32,)


def test_what_cannot_run_is_said() -> None:
    with pytest.raises(ValueError, match="key_block must be 64, 128 or 256, got 32"):
        launch_of("sm_90", False, key=96, launch="key_block=32")
    with pytest.raises(ValueError, match="a program has at most 8 warps"):
        launch_of("sm_90", False, launch="warps=16")
