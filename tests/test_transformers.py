"""`fusion_passes.transformers`: what is bound, that nothing else changes, and that it is undone exactly.

Models are tiny and compiled as few times as possible. `tests/test_delta_rule_calls.py` goes through the arguments of
the functions, `tests/ops/test_chunk_delta_rule.py` tests the op itself.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fusion_passes
from fusion_passes import delta_rule_calls, hf_models
from fusion_passes import transformers as door
from tests.support.bound_functions import arguments, difference, functions, modeling, same

pytest.importorskip("transformers")

MODELS = ("kimi_linear", "glm5_next", "qwen3_next", "qwen3_5", "olmo_hybrid")
OP = torch.ops.fusion_passes.chunk_delta_rule.default


@pytest.fixture(autouse=True)
def nothing_stays_bound() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    door.unbind()
    torch._dynamo.reset()


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_bound_model_gives_the_same(name: str) -> None:
    model, inputs = hf_models.build(name, dtype=torch.float32, layers=3, seq=70, batch=2)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        binding = door.bind(model)
        actual = model(**inputs).last_hidden_state
    assert {bound.layers for bound in binding.bound} == {2} and len(binding.bound) == 2
    assert not binding.skipped and not binding.fallbacks
    assert difference(actual, expected) < 3e-6
    assert not torch.equal(actual, expected), "the op was not called"


@pytest.mark.parametrize("name", MODELS)
def test_one_node_for_any_number_of_tokens(name: str) -> None:
    model, inputs = hf_models.build(name, dtype=torch.float32, seq=70, batch=2)
    # the graph of glm5_next has a thousand nodes more, which take AOTAutograd half a minute
    counter = CompileCounterWithBackend("eager" if name in ("glm5_next", "qwen3_5") else "aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), door.bind(model) as binding:
        for tokens in (70, 33, 129):
            ids = inputs["input_ids"].repeat(1, 2)[:, :tokens].clone()
            torch._dynamo.mark_dynamic(ids, 1)
            actual = compiled(input_ids=ids, use_cache=False).last_hidden_state
            assert difference(actual, model(input_ids=ids, use_cache=False).last_hidden_state) < 3e-6
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    assert sum("chunk_delta_rule" in str(node.target) for node in graph.graph.nodes) == 1
    assert not binding.fallbacks


def test_explain_says_which_layers_are_bound() -> None:
    model, inputs = hf_models.build("kimi_linear", dtype=torch.bfloat16, seq=70)
    with torch.no_grad(), door.bind(model):
        report = fusion_passes.explain(model, **inputs)
    (record,) = [record for record in report.fused if record.fusion == "chunk_delta_rule"]
    assert "the model calls the op" in record.reason
    assert "modeling_kimi_linear.py" in record.source


def test_binding_and_unbinding_compile_again() -> None:
    model, inputs = hf_models.build("olmo_hybrid", dtype=torch.float32, seq=8)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def nodes_of_the_op() -> int:
        compiled(**inputs)
        return sum(node.target is OP for node in counter.graphs[-1].graph.nodes)

    with torch.no_grad():
        with door.bind(model):
            assert nodes_of_the_op() == 1
            assert nodes_of_the_op() == 1 and counter.frame_count == 1
        assert nodes_of_the_op() == 0 and counter.frame_count == 2


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next", "olmo_hybrid"])
def test_generation(name: str) -> None:
    model, prompt = causal_model(name)
    wanted: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, **wanted)
    with door.bind(model) as binding:
        assert torch.equal(model.generate(prompt, **wanted), expected)
        mask = torch.ones_like(prompt)
        mask[0, :4] = 0  # left padding
        padded = model.generate(prompt, attention_mask=mask, **wanted)
    assert not binding.fallbacks
    assert torch.equal(model.generate(prompt, attention_mask=mask, **wanted), padded)


def test_generation_with_a_static_cache_and_compiled_decoding() -> None:
    # with our backend: examples/generate.py
    from transformers import CompileConfig

    model, prompt = causal_model("olmo_hybrid")
    wanted: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, **wanted)
    compile_config: Any = CompileConfig(backend="aot_eager", mode="default", fullgraph=True)
    compile_config._compile_all_devices = True  # on a CPU as well
    torch._dynamo.utils.counters.clear()
    with door.bind(model) as binding:
        tokens = model.generate(prompt, cache_implementation="static", compile_config=compile_config, **wanted)
    assert torch.equal(tokens, expected)
    assert not binding.fallbacks
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one graph for every step of decoding"


def causal_model(name: str) -> tuple[Any, Tensor]:
    """A language model with random weights, and a prompt of 11 tokens for two sequences."""
    base, inputs = hf_models.build(name, dtype=torch.float32, seq=11, batch=2)
    config: Any = base.config
    config.use_cache = True
    head = getattr(modeling(base), type(base).__name__.removesuffix("Model") + "ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = head._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval().requires_grad_(False), inputs["input_ids"]


def test_gradients_still_flow(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = hf_models.build("qwen3_next", dtype=torch.float32, seq=8)
    model.requires_grad_(True)

    def gradient() -> Tensor:
        model.zero_grad()
        model(**inputs).last_hidden_state.square().sum().backward()
        return next(p.grad.clone() for n, p in model.named_parameters() if n.endswith("A_log") and p.grad is not None)

    expected = gradient()
    delta_rule_calls._fallbacks.clear()  # as in a process in which nothing has fallen back yet
    with door.bind(model) as binding, caplog.at_level(logging.WARNING, "fusion_passes.transformers"):
        assert torch.equal(gradient(), expected)
        assert torch.equal(gradient(), expected)
        assert list(binding.fallbacks.values()) == [2]
        assert "gradients are needed" in str(binding)
    assert sum("gradients are needed" in message for message in caplog.messages) == 1


# --- binding and unbinding -------------------------------------------------------------------------------------------


def test_every_architecture_without_a_model() -> None:
    model, _ = hf_models.build("qwen3_next", seq=2)
    before = functions(modeling(model))
    binding = door.bind()
    names = {bound.name.split(".")[2] for bound in binding.bound}
    assert {"kimi_linear", "glm5_next", "qwen3_next", "qwen3_5", "olmo_hybrid"} <= names
    assert not binding.skipped, str(binding)
    assert all(a is not b for a, b in zip(functions(modeling(model)).values(), before.values(), strict=True))
    assert sorted(door.unbind()) == sorted(bound.name for bound in binding.bound)
    assert all(a is b for a, b in zip(functions(modeling(model)).values(), before.values(), strict=True))
    assert door.unbind() == []


def test_a_model_binds_its_own_architecture_alone() -> None:
    kimi, _ = hf_models.build("kimi_linear", seq=2)
    qwen, _ = hf_models.build("qwen3_next", seq=2)
    theirs, ours = functions(modeling(qwen)), functions(modeling(kimi))
    door.bind(kimi)
    assert functions(modeling(qwen)) == theirs and functions(modeling(kimi)) != ours
    assert door.unbind(qwen) == [] and functions(modeling(kimi)) != ours
    assert len(door.unbind(kimi)) == 2 and functions(modeling(kimi)) == ours


def test_bindings_are_counted() -> None:
    model, _ = hf_models.build("kimi_linear", seq=2)
    original = functions(modeling(model))
    with door.bind(model) as outer:
        bound = functions(modeling(model))
        with door.bind(model) as inner:
            assert functions(modeling(model)) == bound and len(inner.bound) == len(outer.bound) == 2
        assert functions(modeling(model)) == bound
        door.bind(model)
    assert functions(modeling(model)) == bound, "the bind without a block still holds"
    outer.release()
    assert functions(modeling(model)) == bound
    assert len(door.unbind()) == 2 and functions(modeling(model)) == original
    inner.release()
    assert functions(modeling(model)) == original


def test_threads() -> None:
    model, _ = hf_models.build("qwen3_next", seq=2)
    original = functions(modeling(model))
    barrier = threading.Barrier(8)
    wrong: list[str] = []

    def work() -> None:
        barrier.wait()
        for _ in range(20):
            with door.bind(model):
                now = functions(modeling(model))
                wrong.extend(name for name, value in now.items() if value is original[name])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and functions(modeling(model)) == original


def test_a_name_that_somebody_else_rebound_is_left_to_them() -> None:
    module, layer = _own_module("theirs", _chunk_of("qwen3_next"))
    binding = door.bind(layer)
    assert len(binding.bound) == 1

    def another(*args: Any, **kwargs: Any) -> None: ...

    module.__dict__["chunk_gated_delta_rule"] = another
    assert door.unbind() == []
    assert module.__dict__["chunk_gated_delta_rule"] is another


def test_functions_that_a_layer_holds_itself() -> None:
    function = _chunk_of("qwen3_next")
    layer: Any = torch.nn.Module()
    layer.chunk_gated_delta_rule = function
    with door.bind(torch.nn.Sequential(layer)) as binding:
        assert binding.bound == [door.Bound("Module.chunk_gated_delta_rule", 1)]
        args = arguments(per_channel=False, tokens=3)
        same(layer.chunk_gated_delta_rule(**args), function(**args))
        assert layer.chunk_gated_delta_rule is not function
    assert layer.chunk_gated_delta_rule is function
    assert str(door.bind(torch.nn.Linear(1, 1))) == "fusion_passes: nothing to bind, no delta rule function was found"


def _chunk_of(name: str) -> Any:
    return functions(modeling(hf_models.build(name, seq=2)[0]))["chunk"]


def _own_module(name: str, function: Any) -> tuple[types.ModuleType, torch.nn.Module]:
    """A Python module with a delta rule function, as remote code has it, and a layer whose class lives in it."""
    module = types.ModuleType(f"transformers_modules.modeling_{name}")
    sys.modules[module.__name__] = module
    module.__dict__["chunk_gated_delta_rule"] = function
    layer = type("Layer", (torch.nn.Module,), {"__module__": module.__name__, "forward": lambda self, x: x + 1})()
    return module, layer


@pytest.fixture(autouse=True)
def own_modules_are_forgotten() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]


def _hidden(layer: Any) -> list[str]:
    """What `explain` says of kernels that hide a delta rule."""
    return [note for note in fusion_passes.explain(layer, torch.ones(2)).notes if "is hidden" in note]


def _skipped(layer: torch.nn.Module, **options: bool) -> str:
    binding = door.bind(layer, **options)
    assert not binding.bound, str(binding)
    (skipped,) = binding.skipped
    assert skipped.reason in str(binding)
    return skipped.reason


def test_other_parameters_are_left_alone() -> None:
    chunk = _chunk_of("qwen3_next")

    def with_offset(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, offset: int = 0) -> Any:
        return chunk(query, key, value, g, beta)

    assert "parameters are not those that are known" in _skipped(_own_module("offset", with_offset)[1])


OTHER_RULES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "other_scale": lambda a: {**a, "query": a["query"] * 1.01},
    "other_decay": lambda a: {**a, "g": 0.69 * a["g"]},
    "state_forgotten": lambda a: {**a, "initial_state": None},
    "always_normalised": lambda a: {**a, "use_qk_l2norm_in_kernel": True},
}


@pytest.mark.parametrize("name", OTHER_RULES)
def test_other_rules_are_left_alone(name: str) -> None:
    chunk = _chunk_of("qwen3_next")

    def other(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64,
        initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        given = {
            "query": query, "key": key, "value": value, "g": g, "beta": beta, "chunk_size": chunk_size,
            "initial_state": initial_state, "output_final_state": output_final_state,
            "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        }  # fmt: skip
        return chunk(**OTHER_RULES[name](given))

    assert _skipped(_own_module(name, other)[1]) == "it computes something else than chunk_delta_rule"


def _served_by_a_kernel(torch_function: Any, calls: list[Any]) -> Any:
    """The function as transformers decorates it where flash-linear-attention is installed."""

    def chunk_gated_delta_rule(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Any = None, window: Any = None, **kwargs: Any
    ) -> str:
        calls.append((cu_seqlens, window))
        return "kernel"

    chunk_gated_delta_rule.__module__ = "fla.ops"
    implementation = chunk_gated_delta_rule

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return implementation(*args, **kwargs) if kwargs.get("is_kernel", True) else torch_function(*args, **kwargs)

    return wrapped


def test_kernels_of_others_keep_their_place_unless_told() -> None:
    calls: list[Any] = []
    served = _served_by_a_kernel(_chunk_of("qwen3_next").__wrapped__, calls)
    module, layer = _own_module("served", served)
    reason = _skipped(layer)
    assert reason.startswith("fla's chunk_gated_delta_rule is in place; bind(replace_kernels=True)")
    assert module.__dict__["chunk_gated_delta_rule"] is served
    (note,) = _hidden(layer)
    assert note.startswith("transformers_modules.modeling_served.chunk_gated_delta_rule is hidden: ")
    assert "fla's chunk_gated_delta_rule, a kernel of its own" in note and "bind(model, replace_kernels=True)" in note
    assert _hidden(layer.forward) == [note]
    with door.bind(layer, replace_kernels=True) as binding:
        assert len(binding.bound) == 1
        assert _hidden(layer) == []
        call = module.__dict__["chunk_gated_delta_rule"]
        args = list(arguments(per_channel=False, tokens=3).values())
        assert isinstance(call(*args)[0], Tensor) and not calls
        # keywords that the kernel heeds, unlike the PyTorch function, are left to it
        for keyword in ("cu_seqlens", "window"):
            assert call(*args, **{keyword: 1}) == "kernel"
    assert len(calls) == 2


def test_kernels_from_the_hub_keep_their_place_unless_told() -> None:
    func = _chunk_of("qwen3_next")

    class Func(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs)

    plain, replaced = Func(), Func()
    replaced.forward = types.MethodType(lambda self, q, **_: "hub", replaced)  # type: ignore[method-assign]
    module, layer = _own_module("hub", plain)
    with door.bind(layer) as binding:
        assert len(binding.bound) == 1
    assert module.__dict__["chunk_gated_delta_rule"] is plain
    assert _hidden(layer) == []
    module.__dict__["chunk_gated_delta_rule"] = replaced
    assert "is in place" in _skipped(layer)
    assert len(_hidden(layer)) == 1
    assert len(door.bind(layer, replace_kernels=True).bound) == 1


def test_wrong_arguments_and_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    name: Any = "kimi_linear"
    for call in (door.bind, door.unbind):
        with pytest.raises(TypeError, match="must be a torch.nn.Module or None, got str"):
            call(name)
    door._architectures.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fusion-passes\[transformers\]'"):
        door.bind()
    assert door.unbind() == []


def test_the_package_does_not_import_transformers() -> None:
    code = "import sys, fusion_passes, fusion_passes.transformers as door; print('transformers' in sys.modules, door)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
