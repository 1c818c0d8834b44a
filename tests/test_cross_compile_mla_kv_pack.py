"""`mla_kv_pack_kernel` compiled for GPUs that are not here: registers, spills and access widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.arch import TABLE, by_name
from fusion_passes.lowering import Launch, Target
from fusion_passes.ops.mla_kv_pack import TABLE as TUNED
from fusion_passes.ops.mla_kv_pack import float8_reason, key_plan, plan
from fusion_passes.plans import operand_of
from tests.support import sass
from tests.support.mla_kv_pack import E4, E5, Arguments

pytest.importorskip("triton.backends.nvidia")

FLOAT8_GPUS = sorted(name for name, on in TABLE.items() if float8_reason(on) is None)


def launch_of(
    arch: str, tokens: int = 4096, heads: int = 128, widths: tuple[int, int, int] = (128, 64, 128), *,
    inlined: bool = True, forced: str = "", **form: Any,
) -> Launch:  # fmt: skip
    nope, pe, value = widths
    kv = torch.empty(1, tokens, heads, nope + value, dtype=torch.bfloat16, device="meta")
    k_pe = torch.empty(1, tokens, pe, dtype=torch.bfloat16, device="meta")
    args = Arguments(kv[..., :nope], k_pe, kv[..., nope:] if value else None, **form)
    with tuning.overriding(**({"mla_kv_pack": forced} if forced else {})):
        target = Target(by_name(arch), int, inlined)
        return (plan if value else key_plan)(target, *map(operand_of, args.positional()))


def tuned_launches() -> list[Any]:
    """Each distinct configuration of the table once, on every GPU that casts to float8."""
    found: dict[tuple[object, ...], Any] = {}
    for arch in FLOAT8_GPUS:
        rows = TUNED.entries.get(arch, TUNED.entries["default"])["pack"]
        bounds = [row["up_to"] for row in rows]
        for index, bound in enumerate(bounds):
            tokens = (bound or 2 * bounds[index - 1]) // 128
            for inlined in (True, False):
                launch = launch_of(arch, tokens, inlined=inlined)
                key = (arch, inlined, *(launch.args[n] for n in ("ROWS", "FLAT", "PDL")), launch.num_warps)
                found.setdefault(key, pytest.param(arch, launch, id="-".join(map(str, key))))
    return list(found.values())


@pytest.mark.parametrize("arch, launch", tuned_launches())
def test_tuned_configurations(arch: str, launch: Launch, tmp_path: Path) -> None:
    binary = sass.compile_launch(launch, arch, tmp_path)
    assert binary.spilled == 0 and binary.registers <= 128
    # Full vectors: k_nope, v and k_pe in 16 bytes, K and V in 16 or, where a thread has fewer columns, 8. The smallest
    # launches have more threads than that: they wait for the launch and not for memory.
    if launch.args["ROWS"] * 64 >= 8 * 32 * launch.num_warps:
        assert binary.count("LDG") == binary.count(r"LDG\.E.*\.128$")
        assert binary.count("STG") == binary.count(r"STG\.E.*\.(128|64)$")
    else:
        assert launch.args["ROWS"] <= 8
    # All loads are issued before the first store, and no thread waits for another.
    assert binary.shared == binary.count("BAR") == binary.count("SHFL") == 0
    assert binary.count(r"F2FP\.SATFINITE\.E4M3") > 0


@pytest.mark.parametrize(
    "arch, steps", [("sm_89", "/s"), ("sm_90", "*s"), ("sm_90", "/s"), ("sm_100", "*0.3 clamp(-2.0,2.0)")]
)
def test_steps_and_formats(arch: str, steps: str, tmp_path: Path) -> None:
    scale = torch.empty((), device="meta") if "s" in steps.split("clamp")[0] else None
    form: dict[str, Any] = {
        "k_scale": scale,
        "v_scale": scale,
        "k_steps": steps,
        "v_steps": steps,
        "k_dtype": E5,
        "v_dtype": E5,
    }
    binary = sass.compile_launch(launch_of(arch, widths=(192, 64, 256), **form), arch, tmp_path)
    assert binary.spilled == 0 and binary.registers <= 168
    assert binary.count(r"F2FP\.SATFINITE\.E5M2") > 0 and binary.count(r"F2FP\.SATFINITE\.E4M3") == 0


def test_one_rounding_per_pair_of_columns(tmp_path: Path) -> None:
    launch = launch_of("sm_90", forced="rows=16,warps=4,flat=1")
    binary = sass.compile_launch(launch, "sm_90", tmp_path)
    # 320 columns x 16 rows over 128 threads are 40 values, and a conversion takes two.
    assert binary.count(r"F2FP\.SATFINITE\.E4M3") == 20
    assert sum(binary.instructions.values()) <= 300



def test_uncast_keys_are_copied_without_arithmetic(tmp_path: Path) -> None:
    for arch in ("sm_80", "sm_90"):
        launch = launch_of(arch, widths=(128, 64, 0), k_dtype=torch.bfloat16, k_layout="bhtd")
        binary = sass.compile_launch(launch, arch, tmp_path)
        assert binary.spilled == 0 and binary.count("F2F") == 0
        assert binary.count("LDG") == binary.count(r"LDG\.E.*\.128$") and binary.count("STG") == binary.count(
            r"STG\.E.*\.128$"
        )


@pytest.mark.parametrize("arch", sorted(set(TABLE) - set(FLOAT8_GPUS)))
def test_other_gpus_say_why(arch: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{arch}.*no saturating conversion"):
        launch_of(arch)
    assert launch_of(arch, widths=(128, 64, 0), k_dtype=torch.bfloat16).args["V"] == 0


def test_float8_comes_from_the_fixture() -> None:
    assert FLOAT8_GPUS == ["sm_100", "sm_89", "sm_90"] and launch_of("sm_89").args["k_out_ptr"].dtype == E4
