"""The public functions of all ops: arguments of a wrong type are named, and Dynamo traces them in one graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusion_passes.ops.chunk_delta_rule import chunk_delta_rule
from fusion_passes.ops.delta_rule_intra import delta_rule_intra
from fusion_passes.ops.gate_cumsum import gate_cumsum
from fusion_passes.ops.head_gate import head_gate
from fusion_passes.ops.index_score import index_score
from fusion_passes.ops.mla_kv_pack import mla_kv_pack
from fusion_passes.ops.qkv_split import qkv_split
from fusion_passes.ops.rotate_pairs import rotate_pairs_
from fusion_passes.ops.topk_mask import topk_mask
from fusion_passes.testing import assert_same

rand = torch.rand

GOOD: dict[Callable[..., Any], Callable[[int], dict[str, Any]]] = {
    gate_cumsum: lambda t: {"raw": rand(1, t, 3, 8), "a_log": rand(3), "bias": rand(3, 8), "chunk_size": 16},
    qkv_split: lambda t: {"x": rand(t, 64), "heads": [2, 2, 4], "dim": 8, "repeats": [1, 1, 1]},
    mla_kv_pack: lambda t: {"k_nope": rand(t, 4, 16), "k_pe": rand(t, 8), "dtype": torch.float32},
    delta_rule_intra: lambda t: {
        "k": rand(1, t, 2, 16) / 4, "v": rand(1, t, 4, 16), "sums": -rand(1, 4, -(-t // 16), 16), "beta": rand(1, t, 4)
    },
    chunk_delta_rule: lambda t: {
        "q": rand(1, t, 2, 8), "k": rand(1, t, 2, 8) / 4, "v": rand(1, t, 4, 16), "g": -rand(1, t, 4),
        "beta": rand(1, t, 4),
    },
    index_score: lambda t: {"q": rand(t, 8, 16), "k": rand(40, 16), "w": rand(t, 8), "causal_offset": 40 - t},
    head_gate: lambda t: {"x": rand(t, 200), "weight": rand(24, 200), "q_scale": rand(t, 24)},
    topk_mask: lambda t: {"scores": rand(t, 50), "k": 7},
    rotate_pairs_: lambda t: {"pairs": rand(t, 3, 5, 2, 4), "cos": rand(t, 3, 5, 1, 4), "sin": rand(1, 1, 5, 1, 4)},
}  # fmt: skip
BY_NAME = {function.__name__: function for function in GOOD}


class Other:
    """Of no type that any argument may have."""


@pytest.mark.parametrize("name", BY_NAME)
def test_arguments_of_a_wrong_type(name: str) -> None:
    function, good = BY_NAME[name], GOOD[BY_NAME[name]](20)
    parameters = inspect.signature(function).parameters
    for argument, parameter in parameters.items():
        with pytest.raises(TypeError, match=f"^{argument} must be a.*, got Other$"):
            function(**{**good, argument: Other()})
        if "None" not in str(parameter.annotation):
            with pytest.raises(TypeError, match=f"^{argument} must be a.*, got NoneType$"):
                function(**{**good, argument: None})
    first = next(iter(parameters))
    with pytest.raises(TypeError, match=f"^{first} must be a tensor, got list$"):
        function(good[first].tolist(), **{key: value for key, value in good.items() if key != first})


def test_lists_of_numbers_that_are_no_integers() -> None:
    for argument, words in (("heads", "a list of integers"), ("dim", "an integer or a list of integers")):
        with pytest.raises(TypeError, match=rf"^{argument} must be {words}, got \[2.0, 2, 4\]"):
            qkv_split(**{**GOOD[qkv_split](5), argument: [2.0, 2, 4]})


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("dynamic", [False, True])
def test_dynamo_traces_it(name: str, dynamic: bool) -> None:
    function = BY_NAME[name]
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)
    for tokens in (20, 37) if dynamic else (20,):
        given = GOOD[function](tokens)
        ours, theirs = ({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()} for _ in "ab")
        with torch.no_grad():
            assert_same((compiled(**ours), ours), (function(**theirs), theirs))
