"""Every tuned configuration of `qkv_split`, compiled for GPUs that are not here: registers, spills, access widths.

Bounds are ranges, since the assembler differs between versions of Triton.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.arch import TABLE, by_name
from fusion_passes.lowering import Launch, Target
from fusion_passes.ops.qkv_split import TABLE as TUNED
from fusion_passes.ops.qkv_split import plan
from fusion_passes.plans import operand_of
from tests.support import sass

pytest.importorskip("triton.backends.nvidia")

NVIDIA = [name for name in TABLE if name.startswith("sm_")]
PITCH = {"rows": 0, "transposed": 4096, "unaligned": 4093}


def launch_of(
    arch: str, shape_class: str, forced: str = "", *, inlined: bool = True, head_major: bool = False,
    heads: tuple[int, ...] = (16, 16, 32), dim: int = 128, dtype: torch.dtype = torch.bfloat16, batch: int = 1,
) -> Launch:  # fmt: skip
    columns = sum(heads) * dim
    pitch = PITCH[shape_class]
    shape = (batch, columns, pitch) if pitch else (batch, 4096, columns)
    x = torch.empty(shape, dtype=dtype, device="meta")
    args = (operand_of(x.mT if pitch else x), list(heads), [dim] * len(heads), [1] * len(heads), head_major)
    with tuning.overriding(**({"qkv_split": forced} if forced else {})):
        return plan(Target(by_name(arch), int, inlined), *args).launches[0]


def tuned() -> list[tuple[str, str, str]]:
    found: dict[tuple[str, str, str], None] = {}
    for arch in TABLE:
        for shape_class in PITCH:
            rows = TUNED.entries.get(arch, TUNED.entries["default"])[shape_class]
            for row in rows if arch == "sm_90" else rows[-1:]:
                forced = ",".join(f"{name}={row[name]}" for name in TUNED.names)
                found[arch, shape_class, forced] = None
    return list(found)


def wide_loads(binary: sass.Binary) -> int:
    return binary.count(r"LDG\.E(\.\w+)*\.128|global_load_dwordx4")


def loads(binary: sass.Binary) -> int:
    return binary.count(r"LDG|global_load")


@pytest.mark.parametrize("arch, shape_class, forced", tuned())
def test_tuned_configurations(arch: str, shape_class: str, forced: str, tmp_path: Path) -> None:
    launch = launch_of(arch, shape_class, forced)
    binary = sass.compile_launch(launch, arch, tmp_path)
    assert binary.spilled == 0
    assert binary.shared <= TABLE[arch].shared_memory // 4
    assert binary.registers <= 128
    # Stores are 16 bytes wide whatever the layout, and so are loads wherever columns (or tokens) are aligned.
    wide = binary.count(r"STG\.E(\.\w+)*\.128|global_store_dwordx4")
    assert wide == binary.count(r"STG|global_store") > 0
    assert (wide_loads(binary) == loads(binary)) == (shape_class != "unaligned")
    # Each half of shared memory's part is moved in wide accesses too.
    if shape_class == "transposed" and arch.startswith("sm_"):
        assert binary.count(r"STS\.128") == binary.count("STS") > 0 and binary.count("LDSM") > 0


def test_seven_windows_leave_one_to_the_second_launch(tmp_path: Path) -> None:
    x = torch.empty(1, 64, 7 * 8, dtype=torch.bfloat16, device="meta")
    program = plan(Target(by_name("sm_90"), int), operand_of(x), [1] * 7, [8] * 7, [1] * 7, False)
    assert [len(launch.outputs) for launch in program.launches] == [6, 1]
    for launch in program.launches:
        assert sass.compile_launch(launch, "sm_90", tmp_path).spilled == 0


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize("head_major", [False, True])
def test_one_binary_serves_aligned_and_unaligned_tokens(arch: str, head_major: bool, tmp_path: Path) -> None:
    """Tokens and pitch at run time: wide loads behind a branch, narrow ones behind the other."""
    for shape_class in ("transposed", "unaligned"):
        launch = launch_of(arch, shape_class, "rows=64,lanes=64,warps=4", inlined=False, head_major=head_major)
        binary = sass.compile_launch(launch, arch, tmp_path)
        assert wide_loads(binary) >= 4 and loads(binary) > wide_loads(binary)
        assert binary.spilled == 0 and binary.registers <= 80
        assert binary.count(r"STG\.E(\.\w+)*\.128") == binary.count("STG")


@pytest.mark.parametrize("shape_class", ["rows", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("heads, dim", [((16, 48), 128), ((5, 5, 7), 96), ((8, 1, 1, 8), 24)])
def test_widths_and_dtypes(
    shape_class: str, dtype: torch.dtype, heads: tuple[int, ...], dim: int, tmp_path: Path
) -> None:
    """Any multiple of eight channels moves 16 bytes at a time."""
    binary = sass.compile_launch(launch_of("sm_90", shape_class, heads=heads, dim=dim, dtype=dtype), "sm_90", tmp_path)
    assert binary.spilled == 0
    assert wide_loads(binary) == loads(binary)
    assert binary.count(r"STG\.E(\.\w+)*\.128") == binary.count("STG")
