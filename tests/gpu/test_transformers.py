"""Bound Hugging Face models on a GPU: the kernels in place of the loop, eager, compiled and in generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fusion_passes import hf_models
from fusion_passes import transformers as door
from tests.support.bound_functions import difference, functions, modeling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

pytest.importorskip("transformers")

MODELS = ("kimi_linear", "glm5_next", "qwen3_next", "qwen3_5", "olmo_hybrid")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def build(name: str, dtype: torch.dtype, tokens: int, batch: int = 2) -> tuple[torch.nn.Module, dict[str, Any]]:
    return hf_models.build(name, dtype=dtype, seq=tokens, batch=batch, device="cuda")


def hidden(call: Any, inputs: dict[str, Any]) -> Tensor:
    result: Tensor = call(**inputs).last_hidden_state
    return result


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 63, 300])
def test_eager(name: str, dtype: torch.dtype, tokens: int) -> None:
    model, inputs = build(name, dtype, tokens)
    with torch.no_grad():
        expected = hidden(model, inputs)
        with door.bind(model) as binding:
            actual = hidden(model, inputs)
        exact = hidden(copy.deepcopy(model).float(), inputs)
    assert not binding.fallbacks
    # A router that is close to a tie sends a token to other experts: the model's own rounding is the measure.
    bound = max(TOLERANCE[dtype], 1.5 * difference(expected, exact))
    assert difference(actual, exact) < bound


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next", "olmo_hybrid"])
@pytest.mark.parametrize("backend", ["fusion_passes", "inductor"])
def test_compiled_for_any_number_of_tokens(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor's padding of products adds guards on the number of tokens, and with them recompiles, of its own.
    monkeypatch.setattr(torch._inductor.config, "shape_padding", False)
    model, inputs = build(name, torch.bfloat16, 300)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), door.bind(model) as binding:
        for tokens in (300, 65, 128):
            ids = inputs["input_ids"][:, :tokens].clone()
            torch._dynamo.mark_dynamic(ids, 1)
            same = {"input_ids": ids, "use_cache": False}
            assert difference(hidden(compiled, same), hidden(model, same)) < TOLERANCE[torch.bfloat16]
    assert counter.frame_count == 1 and not binding.fallbacks


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
def test_generation_with_cuda_graphs(name: str) -> None:
    from transformers import AutoModelForCausalLM, CompileConfig

    base, inputs = build(name, torch.float32, 70)
    config: Any = base.config
    config.use_cache = True
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model = model.eval().requires_grad_(False)
    wanted: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(inputs["input_ids"], disable_compile=True, **wanted)
    compile_config = CompileConfig(backend="fusion_passes", mode="reduce-overhead", fullgraph=True)
    with door.bind(model) as binding:
        tokens = model.generate(
            inputs["input_ids"], cache_implementation="static", compile_config=compile_config, **wanted
        )
    assert torch.equal(tokens, expected) and not binding.fallbacks


def test_head_sizes_without_a_kernel_go_to_the_original() -> None:
    model, _ = build("qwen3_next", torch.float32, 2)
    chunk = functions(modeling(model))["chunk"]
    args = [torch.randn(1, 20, 2, 32, device="cuda") for _ in range(3)]
    args += [-torch.rand(1, 20, 2, device="cuda"), torch.rand(1, 20, 2, device="cuda")]
    with door.bind(model) as binding:
        bound = functions(modeling(model))["chunk"]
        assert torch.equal(bound(*args)[0], chunk(*args)[0])
        assert any("head size" in reason for _, reason in binding.fallbacks)
