"""The redundant_copy fusion in larger graphs: symbolic sizes, several caches, order, training, profit, code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule

import fusion_passes
from fusion_passes.patterns import _copies_chain, redundant_copy
from fusion_passes.testing import assert_same, run_fused
from tests.patterns.redundant_copy_spellings import SPELLINGS, arguments
from tests.patterns.test_redundant_copy import OWN, behind_pass, same_as_eager
from tests.support.redundant_copy import functional_graph, run_after_passes
from tests.support.redundant_copy_rows import ROWS, Dims, make, stacked, two_slices

NAME = "redundant_copy"


# --- symbolic sizes ---------------------------------------------------------------------------------------------------

DYNAMIC = ["M3 kernel, then copy_", "I4 cat(slices)", "K10 stacked by index"]


@pytest.mark.parametrize("name", DYNAMIC)
def test_symbolic_tokens(name: str) -> None:
    """Found with any number of tokens, and no guard is added: one compile serves all."""
    row = ROWS[name]
    compiles: dict[bool, int] = {}
    for fused in (False, True):
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("inductor")
        options = fusion_passes.options(**{**OWN, "fusions": NAME if fused else "none"}, reference_on_cpu=True)

        def compile_fx(gm: GraphModule, inputs: Sequence[Any], own: dict[str, Any] = options) -> Callable[..., Any]:
            from torch._inductor.compile_fx import compile_fx as stock

            compiled: Any = stock(gm, inputs, config_patches=own)
            return compiled

        backend.backend = compile_fx  # type: ignore[assignment]
        compiled = torch.compile(row.function, backend=backend, fullgraph=True)
        for tokens in (4, 7, 9):
            args = make(row.inputs, Dims(tokens=tokens, heads=2, cache=64), dtype=torch.float32)
            for letter, value in zip(row.inputs, args):
                if letter in "xkvi":
                    torch._dynamo.mark_dynamic(value, 0)
            theirs = [a.clone() for a in args]
            with torch.no_grad():
                assert_same(compiled(*args), row.function(*theirs))
            assert_same(args, theirs)
        compiles[fused] = backend.frame_count
    assert compiles[True] == compiles[False]
    assert fusion_passes.report().counts[NAME] >= 1


# --- the graph --------------------------------------------------------------------------------------------------------


def test_a_graph_without_copies_is_untouched() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).relu()
        return torch.cat([y, x.sin()], 1).softmax(-1)

    args = arguments()[0], arguments()[5]
    graph = functional_graph(f, args).graph
    nodes = [(n.name, n.args) for n in graph.nodes]
    chosen = fusion_passes.graph_pass.FusionPass(fusion_passes.settings.snapshot({**OWN, "reference_on_cpu": True}))
    chosen(graph)
    assert [(n.name, n.args) for n in graph.nodes] == nodes and chosen.found == []


def test_two_caches() -> None:
    def f(c: Tensor, d: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c[:4] = k
        d[2:6] = v
        c[4:8] = v
        d[6:10] = c[:4]
        return c @ d.t()

    c, k, v, *_ = arguments()
    report = same_as_eager(f, [c, c + 1, k, v], run_after_passes)
    assert report.counts[NAME] == 2, report


def test_a_copy_with_a_slice_replaced_before_the_input_changes() -> None:
    """The copy is computed from what the input held, in whatever order the memory is written."""

    def f(c: Tensor, k: Tensor, v: Tensor) -> Tensor:
        changed = torch.slice_scatter(c, k, 0, 2, 6)
        c[:4] = v
        c[8:12] = k
        return changed

    def emptied(c: Tensor, k: Tensor, v: Tensor) -> Tensor:
        changed = torch.slice_scatter(c, k, 0, 2, 6)
        c.zero_()
        return changed

    def twice(c: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        changed = torch.slice_scatter(torch.slice_scatter(c, k, 0, 2, 6), v, 0, 4, 8)
        c.copy_(c * 2)
        return changed[1:], c.index_put((torch.arange(4),), v)

    def one_write(c: Tensor, k: Tensor, v: Tensor) -> Tensor:
        changed = torch.slice_scatter(c, k, 0, 2, 6)
        c[:4] = v
        return changed

    for function in (f, emptied, twice, one_write):
        c, k, v, *_ = arguments()
        report = same_as_eager(function, [c, k, v], run_after_passes)
        assert report.counts[NAME] == 1, (function.__name__, report)


def test_a_reader_that_the_graph_has_late_is_moved_forward() -> None:
    """Inductor puts nodes close to their users, here behind the writes: the old content is read before."""

    def f(c: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        old = (c @ w).relu()
        c[:4] = k
        c[4:8] = v
        return old.sum(0) + c.sum(0)

    c, k, v, *_, w = arguments()
    report = same_as_eager(f, [c, k, v, w], run_after_passes)
    assert report.counts[NAME] == 1, report


def test_a_reader_that_needs_both_versions_is_refused() -> None:
    """An old row is kept as a view in the functional graph, and read after its place was overwritten."""

    def f(c: Tensor, k: Tensor, v: Tensor) -> Tensor:
        old = c[:4].clone()
        c[:4] = k
        c[4:8] = v
        # The sum of the new content selects among the old.
        return old.index_select(0, (c.sum() > 0).long().reshape(1))

    c, k, v, *_ = arguments()
    report = same_as_eager(f, [c, k, v], run_after_passes)
    (reason,) = [r.reason for r in report.refusals]
    assert "reads slice_1 after" in reason or "has overwritten it" in reason


def test_training() -> None:
    """Saved activations are results too: nothing that is saved may change or alias."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        q = (x @ w).sin()
        return torch.cat([q[:, :4], q[:, 4:]], 1).cos() * q

    gradients = []
    for run in (lambda *a: f(*a), lambda *a: run_fused(f, *a, **OWN)[0]):
        x, w = (t.clone().requires_grad_() for t in (arguments()[0], arguments()[5]))
        run(x, w).sum().backward()
        gradients.append((x.grad, w.grad))
    assert_same(gradients[1], gradients[0])


def test_a_training_graph_with_a_cache() -> None:
    def f(c: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        c[:4] = k
        c[4:8] = v
        return (c.detach() @ w).sin()

    c, k, v, *_, w = arguments()
    outcomes = []
    for run in (lambda *a: f(*a), lambda *a: run_fused(f, *a, **OWN)[0]):
        cache, weight = c.clone(), w.clone().requires_grad_()
        run(cache, k, v, weight).sum().backward()
        outcomes.append((cache, weight.grad))
    assert_same(outcomes[1], outcomes[0])


def test_failure_leaves_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while the writes are made takes out what was made already."""

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(_copies_chain, "_shown", broken)
    c, k, v, *_ = arguments()
    report = same_as_eager(two_slices, [c, k, v], behind_pass, strict=False)
    assert "internal error: ZeroDivisionError" in report.refusals[0].reason


# --- profit -----------------------------------------------------------------------------------------------------------


def test_small_caches_are_left_to_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch costs more than a small cache takes to be written anew; the limit is where they are equal."""
    args = make("ckv", Dims(tokens=4, cache=64), dtype=torch.float32)
    saved = 2 * 4 * 128 * (64 - 8)
    monkeypatch.setattr(redundant_copy, "LAUNCH_BYTES", saved)
    assert run_fused(two_slices, *args, fusions=NAME)[1].counts[NAME] == 1
    monkeypatch.setattr(redundant_copy, "LAUNCH_BYTES", saved + 1)
    _, report = run_fused(two_slices, *args, fusions=NAME)
    assert report.counts[NAME] == 0 and "stock is faster with one" in report.refusals[0].reason


def test_the_report_says_what_is_saved() -> None:
    _, report = run_fused(stacked, *make("skv", Dims(tokens=4, cache=64), dtype=torch.float32), **OWN)
    (record,) = report.fused
    assert record.saved_bytes == 2 * 4 * (2 * 64 - 8) * 128
    assert record.reason == "2 slice writes into an input of shape [2, 64, 128], in place"


# --- compiled ---------------------------------------------------------------------------------------------------------

COMPILED = [
    "chain_moved", "chain_read_before", "chain_stacked_by_index", "chain_copy_returned",
    "back_in_input_setitem",
]  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code(name: str) -> None:
    """With Inductor's code for the CPU, from a cold cache and a warm one."""
    function, sites = SPELLINGS[name]
    options = fusion_passes.options(**OWN, reference_on_cpu=True)
    for _ in range(2):
        torch._dynamo.reset()
        theirs, ours = arguments(), arguments()
        with torch.no_grad():
            assert_same(torch.compile(function, options=options)(*ours), function(*theirs))
        assert_same(ours, theirs)
    assert fusion_passes.report().counts[NAME] == 2 * sites


def _old_state(cache: Tensor, keys: Tensor) -> Tensor:
    old = cache.clone()
    cache[0, :4] = keys
    cache[1, :4] = keys
    return old


def _old_state_also_read(cache: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    old = _old_state(cache, keys)
    return old.relu(), old


def _shifted_with_its_old_state(cache: Tensor, keys: Tensor) -> Tensor:
    old = cache.clone()
    cache[:, 1:] = cache[:, :-1].clone()
    return old


@pytest.mark.parametrize("function", [_old_state, _old_state_also_read, _shifted_with_its_old_state])
def test_an_old_state_of_an_input_is_saved_from_the_writes(function: Callable[..., Any]) -> None:
    """Inductor takes a copy of a whole input for the input, and has no reason to make it before the writes."""
    ours = [torch.randn(2, 16, 8), torch.randn(4, 8)]
    theirs = [tensor.clone() for tensor in ours]
    options: Any = fusion_passes.options(**OWN, reference_on_cpu=True)
    before = fusion_passes.report().counts.get(NAME, 0)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_same(torch.compile(function, options=options)(*ours), function(*theirs), rtol=0, atol=0)
    assert_same(ours, theirs, rtol=0, atol=0)
    assert fusion_passes.report().counts[NAME] == before + 1
