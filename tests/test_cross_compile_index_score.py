"""The kernel of `index_score` compiled for GPUs that are not here: matrix instructions, registers, spills, loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_passes import tuning
from fusion_passes.arch import by_name
from fusion_passes.lowering import Launch, Program, Target
from fusion_passes.ops._index_score_launch import DECODE, KINDS, TABLE, plan
from fusion_passes.plans import operand_of
from tests.support import sass
from tests.support.index_score import E4, Arguments

pytest.importorskip("triton.backends.nvidia")

KEYS, HEADS, WIDTH = 8192, 64, 128
DTYPES = {"half": torch.bfloat16, "float8": E4, "single": torch.float32}
assert {*DTYPES} == {*KINDS.values()}


def launch_of(
    arch: str, queries: int, dtype: torch.dtype, kind: str = "causal", *, heads: int = HEADS, width: int = WIDTH,
    inlined: bool = True, forced: str = "", **rest: Any,
) -> Launch:  # fmt: skip
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(1, *shape, dtype=dtype, device="meta")

    mask = {"keep": torch.bool, "drop": torch.bool, "add": torch.float32}.get(kind)
    args = Arguments(
        empty(queries, heads, width, dtype=dtype), empty(KEYS, width, dtype=dtype), empty(queries, heads),
        k_scale=empty(KEYS) if dtype == E4 else None,
        mask=None if mask is None else empty(queries, KEYS, dtype=mask), mask_kind=kind,
        **{"causal_offset": KEYS - queries, "scale_after": True, **rest},
    )  # fmt: skip
    with tuning.overriding(**({"index_score": forced} if forced else {})):
        (launch,) = Program.of(plan(Target(by_name(arch), int, inlined), *map(operand_of, args.positional()))).launches
    return launch


def tuned_launches() -> list[Any]:
    """Each distinct configuration of the tables once: all on Hopper, the last of each kind on other GPUs."""
    found: dict[tuple[object, ...], Any] = {}
    for arch, kinds in {"sm_90": list(DTYPES), "sm_80": ["half", "single"], "sm_100": ["half", "float8"]}.items():
        classes = TABLE.entries.get(arch, TABLE.entries["default"])
        for name in (form + end for form in kinds for end in ("", "_decode")):
            for row in classes[name] if arch == "sm_90" else classes[name][-1:]:
                queries = DECODE if name.endswith("_decode") else row["up_to"] or 2048
                dtype = DTYPES[name.removesuffix("_decode")]
                launch = launch_of(arch, queries, dtype, "none" if queries <= DECODE else "causal")
                numbers = (launch.args.get(n, 0) for n in ("KEYS", "ROWS", "STEP"))
                key = (arch, name, *numbers, launch.num_warps, launch.num_stages)
                found.setdefault(key, pytest.param(arch, launch, id="-".join(map(str, key))))
    return list(found.values())


@pytest.mark.parametrize("arch, launch", tuned_launches())
def test_tuned_configurations(arch: str, launch: Launch, tmp_path: Path) -> None:
    binary = sass.compile_launch(launch, arch, tmp_path)
    assert binary.spilled == 0 and binary.registers <= 255
    assert binary.shared <= by_name(arch).shared_memory
    if arch != "sm_100":
        assert binary.count("[HQ]GMMA" if arch == "sm_90" else "HMMA") > 0
        # The tiles come asynchronously, in 16 bytes.
        assert binary.count("LDGSTS") == binary.count(r"LDGSTS\.E.*\.128") > 0


@pytest.mark.parametrize("kind, queries", [("keep", 2048), ("add", 1)])
def test_masks_in_memory(kind: str, queries: int, tmp_path: Path) -> None:
    binary = sass.compile_launch(launch_of("sm_90", queries, torch.bfloat16, kind), "sm_90", tmp_path)
    assert binary.spilled == 0


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 24, "width": 96}, {"heads": 8, "width": 64, "keep_nan": False},
        {"inlined": False, "layout": "bts", "fill": -1e9}, {"scale_after": False, "dtype_": E4},
    ],
    ids=["odd", "few", "eager", "scale_before"],
)  # fmt: skip
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    dtype = options.get("dtype_", torch.bfloat16)
    rest = {name: value for name, value in options.items() if name != "dtype_"}
    assert sass.compile_launch(launch_of("sm_90", 300, dtype, **rest), "sm_90", tmp_path).spilled == 0


@pytest.mark.parametrize("queries", [64, 2048])
def test_nothing_of_the_products_reaches_memory(queries: int, tmp_path: Path) -> None:
    """What is stored is scores: per thread as many words as scores, not as products."""
    launch = launch_of("sm_90", queries, torch.bfloat16, "none")
    binary = sass.compile_launch(launch, "sm_90", tmp_path)
    scores = launch.args["KEYS"] * launch.args.get("STEP", launch.args["ROWS"]) // (32 * launch.num_warps)
    assert 1 <= binary.count("STG") <= max(scores, 1)


@pytest.mark.parametrize("queries, dtype, shape", [(1, torch.bfloat16, (64, 128)), (300, torch.float32, (32, 128))])
def test_amd(queries: int, dtype: torch.dtype, shape: tuple[int, int], tmp_path: Path) -> None:
    """Three products of TF32 are an option of NVIDIA's GPUs; others multiply float32 as it is."""
    launch = launch_of("gfx942", queries, dtype, heads=shape[0], width=shape[1])
    assert launch.args["PRECISION"] == "ieee"
    binary = sass.compile_launch(launch, "gfx942", tmp_path)
    assert binary.spilled == 0 and binary.count("v_mfma") > 0
