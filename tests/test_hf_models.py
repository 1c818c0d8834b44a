"""The random-weight builds run, are finite, repeat with the seed, and take transformers' PyTorch functions."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch

from fusion_passes import hf_models

GATED = hf_models.LINEAR_ATTENTION


@pytest.mark.parametrize("name", hf_models.NAMES)
@torch.no_grad()
def test_forward_is_finite(name: str) -> None:
    model, inputs = hf_models.build(name, dtype=torch.float32, layers=2, seq=64)
    out = model(**inputs).last_hidden_state
    assert out.shape == (1, 64, 256)
    assert torch.isfinite(out).all()
    assert out.std() > 1e-3


@pytest.mark.parametrize("name", GATED)
def test_decay_parameters_are_realistic(name: str) -> None:
    model, _ = hf_models.build(name, layers=3, seq=8)
    found = dict(model.named_parameters())
    logs = [value for key, value in found.items() if key.endswith("A_log")]
    biases = [value for key, value in found.items() if key.endswith("dt_bias")]
    assert len(logs) == len(biases) == 2  # one per linear layer
    for log, bias in zip(logs, biases):
        assert log.exp().min() > 0.4 and log.exp().max() < 16.5
        steps = torch.nn.functional.softplus(bias.float())
        assert steps.min() > 0.9e-3 and steps.max() < 0.11
        assert log.unique().numel() > 1 and bias.unique().numel() > 1


def test_the_two_glm_gates_differ() -> None:
    bounded, _ = hf_models.build("glm5_next", seq=8)
    softplus, _ = hf_models.build("glm5_next_softplus", seq=8)
    assert vars(bounded)["config"].linear_lower_bound == -5.0
    assert vars(softplus)["config"].linear_lower_bound is None


def test_model_without_gate_has_no_decay() -> None:
    model, _ = hf_models.build("deepseek_v3", layers=1, seq=8)
    assert not [key for key, _ in model.named_parameters() if key.endswith(("A_log", "dt_bias"))]


@pytest.mark.parametrize(
    ("name", "hidden", "gated_heads"),
    [
        ("kimi_linear", 2304, 32),
        ("glm5_next", 4096, 64),
        ("glm5_next_softplus", 4096, 64),
        ("qwen3_next", 2048, 32),
        ("qwen3_5", 4096, 32),
        ("olmo_hybrid", 3840, 30),
        ("deepseek_v3", 7168, None),
    ],
)
def test_real_widths_are_the_released_ones(name: str, hidden: int, gated_heads: int | None) -> None:
    model, inputs = hf_models.build(name, real=True, seq=8, device="meta")  # shapes without memory
    assert inputs["input_ids"].shape == (1, 8)
    assert vars(model)["config"].hidden_size == hidden
    heads = [value.numel() for key, value in model.named_parameters() if key.endswith("A_log")]
    assert heads == ([] if gated_heads is None else [gated_heads])


def test_seed_decides_and_the_callers_random_state_stays() -> None:
    before = torch.random.get_rng_state()
    first, ids = hf_models.build("qwen3_next", seq=8, seed=3)
    again, same_ids = hf_models.build("qwen3_next", seq=8, seed=3)
    other, other_ids = hf_models.build("qwen3_next", seq=8, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(ids["input_ids"], same_ids["input_ids"])
    assert not torch.equal(ids["input_ids"], other_ids["input_ids"])
    for (key, value), twin, stranger in zip(first.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(value, twin), key
        if key.endswith("A_log"):
            assert not torch.equal(value, stranger)


def test_kernel_packages_are_hidden_while_importing_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("fla")
    fake.__spec__ = importlib.machinery.ModuleSpec("fla", None)
    monkeypatch.setitem(sys.modules, "fla", fake)
    monkeypatch.delitem(sys.modules, "causal_conv1d", raising=False)
    with hf_models._hidden(hf_models.KERNEL_PACKAGES):
        with pytest.raises(ImportError):
            importlib.import_module("fla")
    assert sys.modules["fla"] is fake
    assert "causal_conv1d" not in sys.modules


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("llama", {}, "unknown model 'llama', choose one of kimi_linear"),
        ("kimi_linear", {"layers": 1}, "needs layers >= 2"),
        ("deepseek_v3", {"seq": 0}, "seq=0"),
    ],
)
def test_bad_arguments_are_named(name: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_models.build(name, **sizes)  # type: ignore[arg-type]


def test_missing_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"fusion-passes\[demo\]"):
        hf_models.build("kimi_linear")
