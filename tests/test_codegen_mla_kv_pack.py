"""The wrapper that Inductor generates for a model that packs MLA keys and values: one launch, nothing copied."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_passes.graph_pass import FusionPass
from fusion_passes.settings import snapshot
from tests.support import fake_cuda
from tests.support.fake_cuda import allocated, body, launches

HEADS, NOPE, PE, V = 16, 128, 64, 128
E4 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _supported() -> None:
    fake_cuda.require()


def serving(x: Tensor, weight: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
    """The call site of a serving engine: a view of the projection, slices, an empty tensor, assignments, casts."""
    kv = torch.mm(x.view(-1, x.shape[-1]), weight).view(-1, HEADS, NOPE + V)
    k_nope, v = kv[..., :NOPE], kv[..., NOPE:]
    k = kv.new_empty(kv.shape[0], HEADS, NOPE + PE)
    k[..., :NOPE] = k_nope
    k[..., NOPE:] = k_pe.view(-1, 1, PE)
    return k.to(E4), v.to(E4)


def scaled(x: Tensor, weight: Tensor, k_pe: Tensor, k_scale: Tensor) -> tuple[Tensor, Tensor]:
    kv = torch.mm(x.view(-1, x.shape[-1]), weight).view(-1, HEADS, NOPE + V)
    k = torch.cat([kv[..., :NOPE], k_pe.view(-1, 1, PE).expand(-1, HEADS, -1)], -1)
    return (k * k_scale).clamp(-448, 448).to(E4), (kv[..., NOPE:] * 0.5).to(E4)


def concatenated(x: Tensor, weight: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
    kv = torch.mm(x.view(-1, x.shape[-1]), weight).view(-1, HEADS, NOPE + V)
    k = torch.cat([kv[..., :NOPE], k_pe.view(-1, 1, PE).expand(-1, HEADS, -1)], -1)
    return k.to(E4), kv[..., NOPE:].to(E4)


def key_alone(x: Tensor, weight: Tensor, k_pe: Tensor) -> Tensor:
    return serving(x, weight, k_pe)[0]


def arguments(tokens: int = 32) -> list[Tensor]:
    x, weight = torch.randn(1, tokens, 64), torch.randn(64, HEADS * (NOPE + V))
    return [x.bfloat16(), weight.bfloat16(), torch.randn(1, tokens, PE).bfloat16()]


def code_of(function: Any, args: list[Tensor], dynamic: tuple[int, ...] = ()) -> str:
    ours = FusionPass(snapshot({"strict": True, "fusions": "mla_kv_pack"}))
    return fake_cuda.wrapper_code(function, args, dynamic=dynamic, options={"post_grad_custom_pre_pass": ours})


@pytest.mark.parametrize("dynamic", [(), (0, 2)])
def test_key_and_value_in_one_launch(dynamic: tuple[int, ...]) -> None:
    code = code_of(serving, arguments(), dynamic)
    (launch,) = launches(code)
    assert launch.startswith("mla_kv_pack_kernel")
    assert "torch.ops.fusion_passes" not in code and "reinterpret_tensor" not in launch
    assert len([line for line in body(code) if "extern_kernels.mm(" in line]) == 1
    # The projection, the key and the value; no buffer for a wide key.
    assert len(allocated(code)) == 3, allocated(code)
    assert sum("torch.float8_e4m3fn" in line for line in allocated(code)) == 2


def test_without_the_pass_there_are_two_launches() -> None:
    assert len(launches(fake_cuda.wrapper_code(concatenated, arguments()))) == 2
    assert len(launches(code_of(concatenated, arguments()))) == 1


@pytest.mark.parametrize("dynamic", [(), (0, 2)])
def test_scales_and_steps_reach_the_kernel(dynamic: tuple[int, ...]) -> None:
    code = code_of(scaled, [*arguments(), torch.tensor(2.0)], dynamic)
    (launch,) = launches(code)
    assert launch.startswith("mla_kv_pack_kernel")
    constants = code[: code.index("def call(")]
    # The scale of the key is a tensor (step 1), that of the value a number (step 4); the clamp is implied.
    assert re.search(r"'K_STEPS': 1\b", constants) and re.search(r"'V_STEPS': 4\b", constants)
    assert re.search(r"'V_FACTOR': 0\.5\b", constants)


def test_a_key_alone() -> None:
    code = code_of(key_alone, arguments())
    (launch,) = launches(code)
    assert launch.startswith("mla_kv_pack_kernel")
    assert re.search(r"'V': 0\b", code)


def test_strides_of_a_compiled_graph_are_constants() -> None:
    code = code_of(serving, arguments())
    constants = code[: code.index("def call(")]
    assert re.search(rf"'NOPE_T': {HEADS * (NOPE + V)}\b", constants) and re.search(r"'PE_T': 64\b", constants)


def test_gpus_without_float8_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_passes import arch

    monkeypatch.setattr(arch, "of_device", lambda device: arch.by_name("sm_80"))
    code = code_of(concatenated, arguments())
    assert len(launches(code)) == 2 and "mla_kv_pack" not in code


def test_only_the_outputs_count_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written = fake_cuda.written_arguments(monkeypatch)
    code_of(serving, arguments())
    assert written == [["k_out_ptr", "v_out_ptr"]]
