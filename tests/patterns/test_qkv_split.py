"""The qkv_split fusion: found whatever the spelling, left alone with a reason where it is something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_passes.patterns import _qkv_profit
from fusion_passes.testing import assert_refuses, run_fused
from tests.patterns.qkv_split_lookalikes import LOOKALIKES
from tests.patterns.qkv_split_spellings import SPELLINGS, B, D, H, K, T, W, numbers

NAME = "qkv_split"


def assert_split(f: Callable[..., Any], *args: Tensor, count: int = 1, **own: Any) -> Any:
    """`f` holds `count` splits, and the rewritten graph gives every bit that `f` gives."""
    actual, report = run_fused(f, *args, **own)
    assert report.counts[NAME] == count, report
    torch.testing.assert_close(actual, f(*args), rtol=0, atol=0)
    return report


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_are_found_and_keep_every_bit(name: str) -> None:
    assert_split(SPELLINGS[name].function, *SPELLINGS[name].inputs())


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_left_alone(name: str) -> None:
    entry = LOOKALIKES[name]
    report = assert_refuses(entry.function, *entry.inputs(), fusion=NAME, reason=entry.reason)
    assert bool(entry.reason) == any(r.fusion == NAME for r in (*report.refusals, *report.near_misses)), report


def test_there_are_enough_of_both() -> None:
    assert len(SPELLINGS) >= 25 and len(LOOKALIKES) >= 25


# --- symbolic sizes --------------------------------------------------------------------------------------------------


def by_tokens(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.split([W, W, 2 * W], dim=-1)
    return tuple(p.unflatten(-1, (-1, K)).contiguous() for p in (q, k, v))


def by_heads(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.split([W, W, 2 * W], dim=-1)
    return tuple(p.unflatten(-1, (-1, K)).transpose(1, 2).contiguous() for p in (q, k, v))


def by_tokens_flat(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.reshape(-1) for p in x.split([W, W, 2 * W], dim=-1))


def across(x: Tensor) -> tuple[Tensor, ...]:
    return by_tokens(x.mT)


def across_by_heads(x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = x.mT.split([2 * W, W, W], dim=-1)
    k, v = (p.unflatten(-1, (H, K)).repeat_interleave(2, dim=2) for p in (k, v))
    return tuple(p.transpose(1, 2).contiguous() for p in (q.unflatten(-1, (2 * H, K)), k, v))


def causal(x: Tensor) -> tuple[Tensor, ...]:
    return by_tokens(x[..., :-3].mT)


def last_tokens(x: Tensor) -> tuple[Tensor, ...]:
    return by_tokens(x[:, 3:])


def projected(x: Tensor) -> tuple[Tensor, ...]:
    return by_tokens(x @ x.new_ones(D, D))


DYNAMIC: dict[str, tuple[Callable[..., Any], bool]] = {
    f.__name__: (f, f in (across, causal))
    for f in (by_tokens, by_heads, by_tokens_flat, across, causal, last_tokens, projected)
}


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("batch", [1, None])
def test_symbolic_tokens_and_batch(name: str, batch: int | None) -> None:
    """One graph serves every number of tokens; no guard is added."""
    function, strided = DYNAMIC[name]
    made = []
    for fusions in ("none", NAME):
        found: list[tuple[int, int]] = []

        def backend(gm: Any, inputs: Any, fusions: str = fusions, found: list[Any] = found) -> Any:
            from fusion_passes.explanation import tracing_backend
            from fusion_passes.graph_pass import FusionPass
            from fusion_passes.settings import snapshot

            explained = FusionPass(snapshot({"strict": True, "reference_on_cpu": True, "fusions": fusions}))
            run = tracing_backend(explained, run_rewritten=True)(gm, inputs)
            context = torch._guards.TracingContext.get()
            assert context.fake_mode is not None and context.fake_mode.shape_env is not None
            found.append((sum(r.outcome == "fused" for r in explained.found), len(context.fake_mode.shape_env.guards)))
            return run

        torch._dynamo.reset()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        for tokens, sequences in ((16, 4), (24, 3), (31, 7)):
            count = sequences if batch is None else batch
            x = numbers(count, D, tokens) if strided else numbers(count, tokens, D)
            torch._dynamo.mark_dynamic(x, 2 if strided else 1)
            if batch is None:
                torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), function(x), rtol=0, atol=0)
        made.append(found)
    assert [sites for sites, _ in made[1]] == [1]
    assert [guards for _, guards in made[0]] == [guards for _, guards in made[1]]


def test_symbolic_columns_are_refused() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.contiguous() for p in x.chunk(2, dim=-1))

    x = numbers(B, T, D)
    torch._dynamo.mark_dynamic(x, 2)
    assert_refuses(f, x, fusion=NAME, reason="for some sizes only")


# --- the rest of the graph -------------------------------------------------------------------------------------------


def test_a_copy_of_the_tensor_is_read_through() -> None:
    """The transposed copy of the whole is not needed: the kernel transposes."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        return by_tokens(x.mT.contiguous())

    report = assert_split(f, numbers(B, D, T))
    assert "column by column" in report.fused[0].reason


def test_a_copy_of_the_tensor_that_others_read_stays() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        turned = x.mT.contiguous()
        return (*by_tokens(turned), turned)

    assert_refuses(f, numbers(B, D, T), fusion=NAME, reason="computed by clone")


def test_two_splits_in_one_graph() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (*by_tokens(x), *by_heads(y))

    report = assert_split(f, numbers(B, T, D), numbers(B, T, D), count=2)
    assert [r.saved_launches for r in report.fused] == [2, 2]


def test_the_report_names_windows_and_layout() -> None:
    report = assert_split(by_heads, numbers(B, T, D))
    wanted = "3 windows of float32, 2 x 16, 2 x 16, 4 x 16 channels, read row by row, copied with heads before tokens"
    assert report.fused[0].reason == wanted


def test_a_gap_leaves_the_windows_beside_it_together() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        return x[..., :8].contiguous(), x[..., W : 2 * W].contiguous(), x[..., 2 * W :].contiguous()

    report = assert_split(f, numbers(B, T, D))
    assert "leave gaps" in report.near_misses[0].reason


def test_windows_may_be_used_as_views_too() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = x.split([W, W, 2 * W], dim=-1)
        return q.contiguous(), k.contiguous(), v.contiguous(), (v * 2).sum()

    assert_split(f, numbers(B, T, D))


def test_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert_split(by_heads, numbers(B, T, D, dtype=dtype))


def test_an_input_that_is_written_in_between() -> None:
    """Functional graphs put writes at the end; the copies keep what they read."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        q = x[..., :W].contiguous()
        x.mul_(2)
        return q, x[..., W:].contiguous()

    x = numbers(B, T, D)
    (q, rest), report = run_fused(f, x.clone())
    wanted = f(x.clone())
    torch.testing.assert_close((q, rest), wanted, rtol=0, atol=0)
    assert report.counts[NAME] == 0


@pytest.mark.parametrize(
    "strided, tokens, symbolic, layout",
    [
        (False, 16, False, "rows"),
        (False, 16, True, "rows"),
        (True, 16, False, "transposed"),
        (True, 13, False, "unaligned"),
        (True, 13, True, "transposed, symbolic"),
    ],
)
def test_size_limits(strided: bool, tokens: int, symbolic: bool, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layout has a limit of its own, in bytes read and written."""
    x = numbers(1, D, tokens) if strided else numbers(1, tokens, D)
    if symbolic:
        torch._dynamo.mark_dynamic(x, 2 if strided else 1)
    f = across if strided else by_tokens
    moved = 2 * 4 * tokens * D
    monkeypatch.setattr(_qkv_profit, "PAYS_UP_TO", dict.fromkeys(_qkv_profit.PAYS_UP_TO, 0) | {layout: moved})
    assert run_fused(f, x)[1].counts[NAME] == 1
    monkeypatch.setitem(_qkv_profit.PAYS_UP_TO, layout, moved - 1)
    assert_refuses(f, x, fusion=NAME, reason=f"({layout})")
    assert run_fused(f, x, always_profitable=True)[1].counts[NAME] == 1


def test_short_sides_of_tiles() -> None:
    """Many short sequences across memory: most of every tile would be empty."""
    x = numbers(600, D, 8)
    assert_refuses(across, x, fusion=NAME, reason="tiles of 8 tokens or channels")
    assert run_fused(by_tokens, x.mT.contiguous())[1].counts[NAME] == 1
    assert run_fused(across, x[:4])[1].counts[NAME] == 1


@torch.library.custom_op("test_qkv_split::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An opaque consumer, which Inductor knows nothing of."""
    return q @ k.mT @ v


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def test_an_op_of_somebodys_own_is_an_opaque_neighbour() -> None:
    def f(x: Tensor) -> Tensor:
        def heads(t: Tensor) -> tuple[Tensor, ...]:
            return tuple(p.unflatten(-1, (-1, K)).transpose(1, 2).contiguous() for p in t.chunk(3, dim=-1))

        mixed = attend(*heads(x)).transpose(1, 2).flatten(2)
        return attend(*heads(attend(mixed, mixed, x)))

    actual, report = run_fused(f, numbers(B, T, 3 * W))
    torch.testing.assert_close(actual, f(numbers(B, T, 3 * W)))
    assert report.counts[NAME] == 2


@pytest.mark.parametrize("kernel", ["flash", "efficient", "mm"])
def test_library_kernels_are_opaque(kernel: str) -> None:
    graph = torch.fx.Graph()
    targets = {
        "flash": torch.ops.aten._scaled_dot_product_flash_attention.default,
        "efficient": torch.ops.aten._scaled_dot_product_efficient_attention.default,
        "mm": torch.ops.aten.mm.default,
    }
    node = graph.call_function(targets[kernel])
    assert _qkv_profit.is_opaque(node)
    assert not _qkv_profit.is_opaque(graph.call_function(torch.ops.aten.mul.Tensor))
