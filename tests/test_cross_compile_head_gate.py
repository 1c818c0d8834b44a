"""The kernels of `head_gate` compiled for GPUs that are not here: matrix instructions, registers, spills, waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.arch import TABLE, by_name
from fusion_passes.lowering import Launch, Program, Target
from fusion_passes.ops.head_gate import TABLE as TUNED
from fusion_passes.ops.head_gate import plan
from fusion_passes.plans import operand_of
from tests.support import sass
from tests.support.head_gate import FORMS, Arguments

pytest.importorskip("triton.backends.nvidia")

COLUMNS, HEADS = 7168, 64
TUNED_FORMS = {"half": "rounded", "split": "split_weight", "float32": "float32"}
NVIDIA = sorted(name for name in TABLE if name.startswith("sm_"))


def launch_of(
    arch: str, tokens: int, form: str, *, inlined: bool = True, forced: str = "", with_scale: bool = False, **rest: Any
) -> Launch:
    x_dtype, w_dtype, product = FORMS[form]
    x = torch.empty(1, tokens, COLUMNS, dtype=x_dtype, device="meta")
    weight = torch.empty(HEADS, COLUMNS, dtype=w_dtype, device="meta")
    q_scale = torch.empty(1, tokens, HEADS, device="meta") if with_scale else None
    args = Arguments(x, weight, q_scale, product_dtype=product, **rest)
    with tuning.overriding(**({"head_gate": forced} if forced else {})):
        (launch,) = Program.of(plan(Target(by_name(arch), int, inlined), *map(operand_of, args.positional()))).launches
    return launch


def tuned_launches() -> list[Any]:
    """Each distinct configuration of the tables once: all on Hopper, one of each kind on other GPUs."""
    found: dict[tuple[object, ...], Any] = {}
    kinds = {
        "sm_90": TUNED_FORMS,
        "sm_80": {"half": "rounded", "float32": "float32"},
        "sm_100": {"split": "split_weight"},
    }
    for arch in kinds:
        for kind, form in kinds[arch].items():
            classes = TUNED.entries.get(arch, TUNED.entries["default"])
            rows = classes[kind] if arch == "sm_90" else classes[kind][-1:]
            for row in rows:
                tokens = row["up_to"] or 2 * (classes[kind][-2]["up_to"] if len(classes[kind]) > 1 else 4096)
                launch = launch_of(arch, tokens, form)
                names = ("ROWS", "HEADS", "DEPTH", "MOST_SPLITS")
                key = (arch, form, *(launch.args.get(n) for n in names), launch.num_warps, launch.num_stages)
                found.setdefault(key, pytest.param(arch, launch, id="-".join(map(str, key))))
    return list(found.values())


@pytest.mark.parametrize("arch, launch", tuned_launches())
def test_tuned_configurations(arch: str, launch: Launch, tmp_path: Path) -> None:
    binary = sass.compile_launch(launch, arch, tmp_path)
    assert binary.spilled == 0 and binary.registers <= 255
    assert binary.shared <= by_name(arch).shared_memory
    if "FORM" not in launch.args:
        # All of a row and of its weights is under way at once, 16 bytes a load, and a block meets once.
        assert binary.count("LDG") == binary.count(r"LDG\.E.*\.128") and binary.count("BAR") <= 2
        assert binary.registers <= 128
        return
    # Tiles come asynchronously in 16 bytes, and meet on the matrix units.
    assert binary.count("LDGSTS") == binary.count(r"LDGSTS\.E.*\.128") > 0
    if arch == "sm_90" and launch.args["HEADS"] >= 64 and launch.num_warps % 4 == 0:
        assert binary.count("HGMMA") > 0 and binary.count("HMMA") == 0
    elif arch != "sm_100":
        assert binary.count("HMMA") > 0


def test_float32_weights_go_through_three_products_of_bfloat16(tmp_path: Path) -> None:
    """The parts stay in registers: nothing but the loads and the result goes through shared memory."""
    forced = "rows=64,heads=64,depth=64,splits=1,warps=4,stages=4,tensor=1"
    split = sass.compile_launch(launch_of("sm_90", 8192, "split_weight", forced=forced), "sm_90", tmp_path)
    single = sass.compile_launch(launch_of("sm_90", 8192, "exact", forced=forced), "sm_90", tmp_path)
    assert split.count("HGMMA") == 3 * single.count("HGMMA") > 0
    assert split.count("STS") <= 8


def test_programs_that_share_a_tile_wait_once(tmp_path: Path) -> None:
    forced = "rows=16,heads=32,depth=128,splits={},warps=4,stages=3,tensor=1"
    shared = sass.compile_launch(launch_of("sm_90", 64, "rounded", forced=forced.format(14)), "sm_90", tmp_path)
    alone = sass.compile_launch(launch_of("sm_90", 64, "rounded", forced=forced.format(1)), "sm_90", tmp_path)
    # One word is set, another is watched.
    assert shared.count("ATOM") == 2 and alone.count("ATOM") == 0
    # The sums of the 13 others are read one after the other without a barrier between them.
    assert shared.count("BAR") <= alone.count("BAR") + 12
    assert shared.count(r"LDG\.E.*128\.STRONG\.GPU") >= 13


@pytest.mark.parametrize("form", ["rounded", "split_weight", "float32"])
def test_options(form: str, tmp_path: Path) -> None:
    launch = launch_of("sm_90", 300, form, inlined=False, with_scale=True, head_first=True, dtype=torch.bfloat16)
    assert sass.compile_launch(launch, "sm_90", tmp_path).spilled == 0


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("form", ["rounded", "split_weight"])
def test_amd(form: str, tokens: int, tmp_path: Path) -> None:
    binary = sass.compile_launch(launch_of("gfx942", tokens, form), "gfx942", tmp_path)
    assert binary.spilled == 0
    assert (binary.count("v_mfma") > 0) == (tokens > 1)
