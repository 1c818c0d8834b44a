"""Hugging Face models with random weights, in the plain PyTorch spelling, for tests, demo and benchmarks.

    model, inputs = build("kimi_linear", dtype=torch.bfloat16, layers=2, seq=256)
    model(**inputs).last_hidden_state  # [batch, seq, hidden]

Tiny builds keep the head dimensions of the released models, which is what kernels depend on, and shrink the
rest. `real=True` keeps every width and shrinks only depth, vocabulary and the mixture of experts (dense MLPs).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

__all__ = ["LINEAR_ATTENTION", "NAMES", "build", "decoding"]

VOCAB = 512
# Packages whose kernels transformers binds while a model's module is imported.
KERNEL_PACKAGES = ("fla", "causal_conv1d")
LINEAR, FULL = "linear_attention", "full_attention"
# Step sizes that the published initialisation of these gates draws from, log-uniform.
STEP_MIN, STEP_MAX = 1e-3, 1e-1


@dataclass(frozen=True)
class Recipe:
    """How one architecture is built: `module` under `transformers.models`, class names, config values."""

    module: str
    config: str
    model: str
    tiny: dict[str, Any]
    always: dict[str, Any] = field(default_factory=dict)
    mixes_layers: bool = True
    dense_mlp: str = ""  # the config's own way to say "no experts"
    rate_range: tuple[float, float] = (1.0, 16.0)  # exp(A_log)
    attention: str = "sdpa"


_MLA_TINY = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
}
_KDA_TINY = {"linear_num_heads": 2}
_GQA_TINY = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
_GDN_TINY = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_INDEXER_TINY = {**_MLA_TINY, "q_lora_rank": 128, "index_topk": 64, "index_n_heads": 8}
_GLM_TINY = {**_INDEXER_TINY, **_KDA_TINY}


def _indexed(module: str, prefix: str, attention: str = "sdpa") -> Recipe:
    """A model with sparse attention, whose indexer every layer has."""
    return Recipe(
        module, f"{prefix}Config", f"{prefix}Model", _INDEXER_TINY,
        mixes_layers=False, dense_mlp="mlp_layer_types", attention=attention,
    )  # fmt: skip


def _glm(lower_bound: float | None, rate_range: tuple[float, float]) -> Recipe:
    always = {"linear_lower_bound": lower_bound}
    return Recipe(
        "glm5_next", "Glm5NextTextConfig", "Glm5NextTextModel", _GLM_TINY, always,
        dense_mlp="mlp_layer_types", rate_range=rate_range,
    )


_RECIPES = {
    "kimi_linear": Recipe(
        "kimi_linear", "KimiLinearConfig", "KimiLinearModel", {**_MLA_TINY, **_KDA_TINY},
        dense_mlp="mlp_layer_types",
    ),
    "glm5_next": _glm(-5.0, (0.5, 2.0)),
    "glm5_next_softplus": _glm(None, (1.0, 16.0)),
    "qwen3_next": Recipe(
        "qwen3_next", "Qwen3NextConfig", "Qwen3NextModel", {**_GQA_TINY, **_GDN_TINY}, dense_mlp="mlp_only_layers"
    ),
    "qwen3_5": Recipe("qwen3_5", "Qwen3_5TextConfig", "Qwen3_5TextModel", {**_GQA_TINY, **_GDN_TINY}),
    "olmo_hybrid": Recipe(
        "olmo_hybrid", "OlmoHybridConfig", "OlmoHybridModel",
        {**_GQA_TINY, "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
        {"linear_key_head_dim": 96, "linear_value_head_dim": 192},
    ),
    "deepseek_v3": Recipe(
        "deepseek_v3", "DeepseekV3Config", "DeepseekV3Model", {**_MLA_TINY, "q_lora_rank": 128},
        mixes_layers=False, dense_mlp="first_k_dense_replace",
    ),
    "deepseek_v32": _indexed("deepseek_v32", "DeepseekV32"),
    "glm_moe_dsa": _indexed("glm_moe_dsa", "GlmMoeDsa"),
    "hy_v4": _indexed("hy_v4", "HYV4", attention="eager"),  # it has no other
}
NAMES = tuple(_RECIPES)
# Those whose layers, but for the last, have a gated delta rule.
LINEAR_ATTENTION = tuple(name for name, recipe in _RECIPES.items() if recipe.mixes_layers)


@contextlib.contextmanager
def _hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Make `import package` fail, so that transformers falls back to its PyTorch functions."""
    saved = {name: sys.modules.get(name) for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in saved.items() if module is not None})


def _modeling(recipe: Recipe) -> tuple[ModuleType, ModuleType]:
    """The architecture's modeling and configuration modules."""
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("building Hugging Face models needs transformers: pip install 'fusion-passes[demo]'")
    stem = f"transformers.models.{recipe.module}"
    try:
        configuration = importlib.import_module(f"{stem}.configuration_{recipe.module}")
    except ModuleNotFoundError as error:
        version = importlib.import_module("transformers").__version__
        raise ImportError(
            f"transformers {version} has no {recipe.module}: pip install 'transformers>=5.17'"
        ) from error
    with _hidden(KERNEL_PACKAGES):
        modeling = importlib.import_module(f"{stem}.modeling_{recipe.module}")
    return modeling, configuration


def _config_values(recipe: Recipe, layers: int, real: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
        **recipe.always,
        **({} if real else recipe.tiny),
    }
    if recipe.mixes_layers:
        values["layer_types"] = [LINEAR] * (layers - 1) + [FULL]
    match recipe.dense_mlp:
        case "mlp_layer_types":
            values["mlp_layer_types"] = ["dense"] * layers
        case "mlp_only_layers":
            values["mlp_only_layers"] = list(range(layers))
        case "first_k_dense_replace":
            values["first_k_dense_replace"] = layers
    return values


@torch.no_grad()
def _initialise_decay(model: torch.nn.Module, recipe: Recipe) -> None:
    """Draw `A_log` and `dt_bias` as trained gates have them: decays that forget over 1 to 1000 tokens."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.copy_(torch.empty_like(parameter, dtype=torch.float32).uniform_(*recipe.rate_range).log_())
        elif name.endswith("dt_bias"):
            log_step = torch.empty_like(parameter, dtype=torch.float32)
            log_step.uniform_(math.log(STEP_MIN), math.log(STEP_MAX))
            parameter.copy_(log_step.exp().expm1().log())  # inverse softplus


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    layers: int = 2,
    seq: int = 128,
    batch: int = 1,
    seed: int = 0,
    real: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model in eval mode without gradients, and keyword arguments for one forward.

    Of those in `LINEAR_ATTENTION`, with `layers >= 2`, all layers but the last use linear attention and the last one
    full attention; the others take `layers >= 1`. `inputs["input_ids"]` is int64 [batch, seq]. The caller's random
    state is kept.
    Raises `ValueError` for unknown names and sizes, `ImportError` without transformers 5.17 or newer.
    """
    if name not in _RECIPES:
        raise ValueError(f"unknown model {name!r}, choose one of {', '.join(NAMES)}")
    recipe = _RECIPES[name]
    least = 2 if recipe.mixes_layers else 1
    if layers < least or seq < 1 or batch < 1:
        raise ValueError(
            f"{name} needs layers >= {least}, seq >= 1, batch >= 1, got layers={layers}, seq={seq}, batch={batch}"
        )
    modeling, configuration = _modeling(recipe)
    config = getattr(configuration, recipe.config)(**_config_values(recipe, layers, real))
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = getattr(modeling, recipe.model)._from_config(config, dtype=dtype, attn_implementation=recipe.attention)
        _initialise_decay(model, recipe)
        ids = torch.randint(3, VOCAB, (batch, seq))
    return model.eval().requires_grad_(False), {"input_ids": ids, "use_cache": False}


@torch.no_grad()
def decoding(model: torch.nn.Module, inputs: dict[str, Any], steps: int = 1) -> dict[str, Any]:
    """Keyword arguments of the step behind a prompt: one more token, and a static cache that holds the prompt.

    Args:
        model: from `build`.
        inputs: the prompt, from `build` too; it is run eagerly.
        steps: how many calls with these arguments the cache has room for.
    """
    ids = inputs["input_ids"]
    static_cache = importlib.import_module("transformers").StaticCache
    cache = static_cache(config=model.config, max_cache_len=ids.shape[1] + steps)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    return {"input_ids": ids[:, :1].clone(), "past_key_values": cache, "use_cache": True}
