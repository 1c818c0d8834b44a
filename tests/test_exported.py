"""Programs of `torch.export`: fused by `apply`, and as packages of AOTInductor."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fusion_passes
from fusion_passes import hf_models
from tests.support.sites import SITES

ON_CPU = {"reference_on_cpu": True, "strict": True}


class Gate(torch.nn.Module):
    """The gate of Kimi delta attention, summed up in chunks of 64 tokens, and what is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a_log = torch.nn.Parameter(torch.linspace(-1, 1, 4))
        self.dt_bias = torch.nn.Parameter(torch.linspace(-2, 2, 128).view(4, 32))

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        gate = -self.a_log.exp()[:, None] * torch.nn.functional.softplus(raw + self.dt_bias)
        return raw * 2, gate.view(raw.shape[0], -1, 64, 4, 32).cumsum(2)


def exported(dynamic: bool = False) -> torch.export.ExportedProgram:
    chunks = torch.export.Dim("chunks", min=2, max=100)
    with torch.no_grad():
        return torch.export.export(Gate(), (raw(2),), dynamic_shapes=({1: 64 * chunks},) if dynamic else None)


def raw(chunks: int) -> Tensor:
    return torch.randn(2, 64 * chunks, 4, 32, generator=torch.Generator().manual_seed(chunks))


def calls(program: torch.export.ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if "fusion_passes" in str(n.target)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_program_is_fused_and_keeps_its_results(dynamic: bool) -> None:
    program = exported(dynamic)
    fused = fusion_passes.apply(program, **ON_CPU)
    assert calls(fused) == ["fusion_passes.gate_cumsum.default"] and calls(program) == []
    stream = io.BytesIO()
    torch.export.save(fused, stream)
    stream.seek(0)
    for module in (fused.module(), torch.export.load(stream).module()):
        for chunks in (2, 5) if dynamic else (2,):
            for actual, wanted in zip(module(raw(chunks)), program.module()(raw(chunks))):
                torch.testing.assert_close(actual, wanted)


def test_a_hugging_face_model() -> None:
    model, inputs = hf_models.build("qwen3_next", dtype=torch.float32, layers=2, seq=100)

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, use_cache=False).last_hidden_state

    with torch.no_grad():
        program = torch.export.export(Hidden(), (inputs["input_ids"],))
        fused = fusion_passes.apply(program, expect={"chunk_delta_rule": 1}, **ON_CPU)
        torch.testing.assert_close(fused.module()(inputs["input_ids"]), model(**inputs).last_hidden_state)


def test_casts_of_an_exported_program_are_no_uses() -> None:
    """Before a cast, export asserts the dtype of what is cast: here, of intermediates of the site."""
    site = SITES["mla_kv_pack"]
    inputs = tuple(site.inputs(8))

    class Pack(torch.nn.Module):
        def forward(self, kv: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
            return site.function(kv, pe)

    program = torch.export.export(Pack(), inputs)
    assert any("_assert_tensor_metadata" in str(node.target) for node in program.graph.nodes)
    fused = fusion_passes.apply(program, always_profitable=True, **ON_CPU)
    assert calls(fused) == ["fusion_passes.mla_kv_pack.default"]
    for actual, wanted in zip(fused.module()(*inputs), site.function(*inputs)):
        assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))


def test_settings_and_wrong_arguments() -> None:
    program = exported()
    assert fusion_passes.apply(program, enabled=False) is program
    assert calls(fusion_passes.apply(program, fusions="qkv_split", **ON_CPU)) == []
    assert calls(fusion_passes.apply(program)) == []  # it is on the CPU
    with pytest.raises(TypeError, match="must be an ExportedProgram .* got Gate"):
        fusion_passes.apply(Gate())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fusion_passes.fusion"):
        fusion_passes.apply(program, fusion="gate_cumsum")
    with pytest.raises(fusion_passes.ExpectationError, match="gate_cumsum"):
        fusion_passes.apply(program, expect={"gate_cumsum": 2}, **ON_CPU)


def test_a_package_of_aot_inductor(tmp_path: Path) -> None:
    program = exported()
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "gate.pt2"), inductor_configs=fusion_passes.options(**ON_CPU)
    )
    assert fusion_passes.report().counts["gate_cumsum"] == 1
    for actual, wanted in zip(torch._inductor.aoti_load_package(path)(raw(2)), program.module()(raw(2))):
        torch.testing.assert_close(actual, wanted)
