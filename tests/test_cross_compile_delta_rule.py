"""The kernels of `chunk_delta_rule`, compiled for GPUs that are not here: registers, spills, shared memory, widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.arch import TABLE, by_name
from fusion_passes.lowering import Operand, Program, Target
from fusion_passes.ops._chunk_delta_rule_plan import plan
from fusion_passes.plans import operand_of
from tests.support import sass

pytest.importorskip("triton.backends.nvidia")

BOTH = pytest.mark.parametrize("per_channel", [False, True])


def program(
    arch: str, per_channel: bool, *, tokens: int = 4096, heads: tuple[int, int] = (16, 32), key: int = 128,
    value: int = 128, dtype: torch.dtype = torch.bfloat16, launch: str = "",
) -> Program:  # fmt: skip
    def operand(*shape: int, kind: torch.dtype = dtype) -> Operand:
        return operand_of(torch.empty(shape, dtype=kind, device="meta"))

    key_heads, value_heads = heads
    gates = (value_heads, key) if per_channel else (value_heads,)
    tensors: list[Any] = [operand(1, tokens, key_heads, key), operand(1, tokens, key_heads, key)]
    tensors += [operand(1, tokens, value_heads, value), operand(1, tokens, *gates), operand(1, tokens, value_heads)]
    tensors += [operand(value_heads, kind=torch.float32), operand(*gates, kind=torch.float32), None, None]
    with tuning.overriding(**({"chunk_delta_rule": launch} if launch else {})):
        form: tuple[Any, ...] = (0.1, 1e-6, "softplus", 0.0, 1.0, dtype, True)
        return plan(*(Target(by_name(arch), int), *tensors, *form))


@BOTH
@pytest.mark.parametrize("arch", list(TABLE))
def test_every_architecture(arch: str, per_channel: bool, tmp_path: Path) -> None:
    prologue, *_, scan = program(arch, per_channel, heads=(32, 32)).launches
    for launch in (prologue, scan):
        binary = sass.compile_launch(launch, arch, tmp_path)
        assert binary.shared <= TABLE[arch].shared_memory
        if launch is scan and arch in ("sm_90", "sm_100"):
            assert binary.spilled == 0
            assert binary.registers <= 168
        # The prologue's tiles of 64 x 128 channels do not all fit into registers, least of all before sm_90.
        assert binary.spilled <= (16 if launch is scan else 3072 if per_channel else 512)


@BOTH
def test_hopper_uses_its_own_matrix_instructions(per_channel: bool, tmp_path: Path) -> None:
    for launch in program("sm_90", per_channel).launches:
        binary = sass.compile_launch(launch, "sm_90", tmp_path)
        assert binary.count("HGMMA") > 0
    # Copies to shared memory are asynchronous and 16 bytes wide: three stages of them, and one more to start with.
    assert binary.count(r"LDGSTS\.E\.BYPASS\.128") >= 60
    assert binary.count("BAR") <= 14


@BOTH
@pytest.mark.parametrize("key, value, dtype", [(96, 192, torch.bfloat16), (256, 64, torch.bfloat16),
                                               (128, 128, torch.float32), (256, 256, torch.float32)])  # fmt: skip
def test_widths_fit(key: int, value: int, dtype: torch.dtype, per_channel: bool, tmp_path: Path) -> None:
    """Shared memory is estimated before it is known: the estimate may not be too small."""
    for launch in program("sm_90", per_channel, key=key, value=value, dtype=dtype, tokens=256).launches[1:]:
        assert sass.compile_launch(launch, "sm_90", tmp_path).shared <= TABLE["sm_90"].shared_memory


@BOTH
def test_few_heads_are_cut_into_segments(per_channel: bool, tmp_path: Path) -> None:
    launches = program("sm_90", per_channel, tokens=16384, heads=(8, 8)).launches
    assert [launch.kernel.fn.__name__ for launch in launches[1:]] == ["delta_rule_scan_kernel"] * 2
    assert [launch.args["SUMMARY"] for launch in launches[1:]] == [True, False]
    assert launches[1].args["SEGMENTS"] == launches[2].args["SEGMENTS"] == 8
    assert sass.compile_launch(launches[1], "sm_90", tmp_path).spilled == 0
    # Applying the maps takes a few registers more than there are, once per program.
    assert sass.compile_launch(launches[2], "sm_90", tmp_path).spilled <= 256


def test_what_cannot_run_is_said() -> None:
    with pytest.raises(ValueError, match="columns must be at least 16 and divide the 128 values"):
        program("sm_90", False, launch="columns=8")
    with pytest.raises(ValueError, match="at most 8 warps"):
        program("sm_90", False, launch="scan_warps=16")
    with pytest.raises(ValueError, match="stages must be at least 2"):
        program("sm_90", False, launch="stages=1")
