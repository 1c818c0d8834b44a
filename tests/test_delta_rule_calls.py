"""What stands in for the delta rule functions of transformers: the same for every argument, or the original itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config

from fusion_passes import delta_rule_calls, hf_models
from fusion_passes import transformers as door
from tests.support.bound_functions import arguments, difference, functions, modeling, same

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["kimi_linear", "qwen3_next"])
def pair(request: pytest.FixtureRequest) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    """Whether decays are per channel, the original functions and the bound ones."""
    model, _ = hf_models.build(request.param, seq=2)
    originals = functions(modeling(model))
    with door.bind(model):
        return request.param == "kimi_linear", originals, functions(modeling(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["chunk", "recurrent"])
@pytest.mark.parametrize("with_state", [False, True])
def test_every_argument(pair: Any, kind: str, dtype: torch.dtype, with_state: bool) -> None:
    per_channel, originals, bound = pair
    before = delta_rule_calls.fallbacks()
    for tokens in (1, 2, 64, 70):
        args = arguments(per_channel=per_channel, tokens=tokens, dtype=dtype)
        state = torch.randn(2, 3, 16, 8, dtype=dtype) if with_state else None
        for norm, final in ((True, True), (True, False), (False, True)):
            # long keys that are not normalised make the state grow without bounds
            keys = {} if norm else {"key": args["key"] / 8}
            call = {**args, **keys, "initial_state": state, "output_final_state": final}
            expected = originals[kind](**call, use_qk_l2norm_in_kernel=norm)
            actual = bound[kind](**call, use_qk_l2norm_in_kernel=norm)
            same(actual, expected, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    assert delta_rule_calls.fallbacks() == before


def test_layouts_positions_defaults_and_dropped_keywords(pair: Any) -> None:
    per_channel, originals, bound = pair
    args = arguments(per_channel=per_channel)
    innermost_tokens = {name: x.transpose(1, -1).contiguous().transpose(1, -1) for name, x in args.items()}
    dropped: dict[str, Any] = {"use_cache": True, "input_ids": torch.zeros(2, 70), "cu_seqlens": None}
    before = delta_rule_calls.fallbacks()
    same(bound["chunk"](**innermost_tokens), originals["chunk"](**args))
    same(bound["chunk"](*args.values(), 32), originals["chunk"](*args.values(), 32))
    same(bound["chunk"](**args, **dropped), originals["chunk"](**args, **dropped))
    same(bound["recurrent"](*args.values(), None, True), originals["recurrent"](*args.values(), None, True))
    state = torch.randn(2, 3, 8, 16).mT
    same(
        bound["recurrent"](**args, initial_state=state, output_final_state=True),
        originals["recurrent"](**args, initial_state=state, output_final_state=True),
    )
    assert delta_rule_calls.fallbacks() == before


FALLBACKS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "float64": (lambda a: {**a, "query": a["query"].double()}, "float64"),
    "packed": (lambda a: {**a, "cu_seqlens": torch.tensor([0, 140])}, "cu_seqlens"),
    "gradient": (lambda a: {**a, "value": a["value"].clone().requires_grad_()}, "gradients"),
    "one_state_for_all": (lambda a: {**a, "initial_state": torch.ones(1, 3, 16, 8)}, "initial state"),
    "one_beta_for_all": (lambda a: {**a, "beta": a["beta"][:, :, :1]}, "batch, tokens or heads"),
    "one_decay_for_all": (lambda a: {**a, "g": a["g"][:, :, :1]}, "batch, tokens or heads"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_the_op_cannot_take_goes_to_the_original(pair: Any, name: str) -> None:
    per_channel, originals, bound = pair
    change, reason = FALLBACKS[name]
    args = change({**arguments(per_channel=per_channel), "initial_state": None})
    before = sum(delta_rule_calls.fallbacks().values())
    for kind in ("chunk", "recurrent"):
        for a, b in zip(bound[kind](**args, output_final_state=True), originals[kind](**args, output_final_state=True)):
            assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    assert sum(delta_rule_calls.fallbacks().values()) == before + 2
    assert any(reason in text for _, text in delta_rule_calls.fallbacks())


def test_the_other_form_of_decay_is_left_to_the_original(pair: Any) -> None:
    per_channel, originals, bound = pair
    args = arguments(per_channel=not per_channel)
    results = []
    for function in (originals["chunk"], bound["chunk"]):
        try:
            results.append(function(**args))
        except (RuntimeError, ValueError, IndexError) as error:
            results.append(type(error))
    assert results[0] == results[1] or torch.equal(results[0][0], results[1][0])


def test_gradients_that_nobody_asks_for_do_not_matter(pair: Any) -> None:
    per_channel, _, bound = pair
    args = arguments(per_channel=per_channel, tokens=3)
    before = delta_rule_calls.fallbacks()
    with torch.no_grad():
        bound["chunk"](**{**args, "value": args["value"].requires_grad_()})
    assert delta_rule_calls.fallbacks() == before


def test_autocast_does_not_round_more(pair: Any) -> None:
    per_channel, originals, bound = pair
    args = {**arguments(per_channel=per_channel), "use_qk_l2norm_in_kernel": True}
    exact, _ = originals["chunk"](**args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, _ = originals["chunk"](**args)
        ours, _ = bound["chunk"](**args)
    assert ours.dtype == theirs.dtype
    assert difference(ours, exact) < 1.5 * difference(theirs, exact)


def test_the_tokens_of_a_gpu_have_other_limits() -> None:
    args = arguments(per_channel=False, tokens=2)
    known = delta_rule_calls.Replaced(lambda **_: None, "name", (3,))  # type: ignore[arg-type]

    def reason(key_dim: int, value_dim: int, device: str) -> str | None:
        with torch._subclasses.FakeTensorMode():
            q, v = torch.empty(2, 2, 3, key_dim, device=device), torch.empty(2, 2, 3, value_dim, device=device)
            g = torch.empty(2, 2, 3, device=device)
            return delta_rule_calls.obstacle(known, q, q, v, g, g, None, {})

    assert args["query"].shape[-1] == 16 and reason(16, 8, "cpu") is None
    assert reason(128, 128, "cuda") is None and reason(96, 192, "cuda") is None
    for sizes in ((16, 128), (128, 16)):
        assert "head size" in str(reason(*sizes, "cuda"))
    assert "xpu" in str(reason(128, 128, "xpu"))


def test_inductor_keeps_the_channels_innermost() -> None:
    # Tokens lie innermost after the convolution over time, and left to itself Inductor lays out what follows alike.
    model, _ = hf_models.build("qwen3_next", dtype=torch.float32, seq=2)
    layer = model.get_submodule("layers.0.linear_attn")
    hidden = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True), door.bind(model):
        compiled = torch.compile(layer, fullgraph=True)(hidden)
        torch.testing.assert_close(compiled, layer(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens, calls", [(1, 0), (2, 1)])
def test_a_compiled_step_of_one_token_is_left_to_inductor(pair: Any, tokens: int, calls: int) -> None:
    per_channel, originals, bound = pair
    args = arguments(per_channel=per_channel, tokens=tokens)
    seen: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(module)
        return module.forward

    torch._dynamo.reset()
    before = delta_rule_calls.fallbacks()
    actual = torch.compile(bound["recurrent"], backend=keep, fullgraph=True)(**args, output_final_state=True)
    same(actual, originals["recurrent"](**args, initial_state=None, output_final_state=True), 1e-5)
    (graph,) = seen
    assert sum("chunk_delta_rule" in str(node.target) for node in graph.graph.nodes) == calls
    assert delta_rule_calls.fallbacks() == before
