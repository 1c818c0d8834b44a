"""The spellings mean what they claim and the look-alikes do not: eager results against a float64 loop."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from tests.patterns.gate_cumsum_cases import Case, Entry, arrange
from tests.patterns.gate_cumsum_spellings import EITHER, LOOKALIKES, SPELLINGS

# float32 sums of up to 128 gates; exp(A_log) reaches 16
RELATIVE, ABSOLUTE = 2e-5, 5e-4
KINDS = {"", "value", "rounding", "dtype", "shape", "size", "escape"}


def _parameters(table: dict[str, Entry]) -> list[object]:
    return [pytest.param(entry, id=name) for name, entry in table.items()]


def _run(entry: Entry) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first output and the other ones."""
    result = entry.function(*entry.inputs())
    return (result, ()) if isinstance(result, Tensor) else (result[0], tuple(result[1:]))


def _excess(found: Tensor, expected: Tensor) -> float:
    """Largest error in units of the tolerance."""
    error = (found.double() - expected).abs()
    error = torch.where(error.isnan(), torch.inf, error)
    return float((error / (ABSOLUTE + RELATIVE * expected.abs())).max())


@pytest.mark.parametrize("entry", _parameters(SPELLINGS))
@torch.no_grad()
def test_spelling_equals_the_meaning(entry: Entry) -> None:
    result, others = _run(entry)
    expected = entry.case.meaning()
    assert not others
    assert result.dtype == torch.float32
    assert result.shape == expected.shape
    assert _excess(result, expected) <= 1


@pytest.mark.parametrize("entry", _parameters({**LOOKALIKES, **EITHER}))
@torch.no_grad()
def test_lookalike_differs_as_it_claims(entry: Entry) -> None:
    result, others = _run(entry)
    expected = entry.case.meaning()
    if entry.differs == "shape":
        assert result.shape != expected.shape
        return
    assert result.shape == expected.shape
    match entry.differs:
        case "value":
            assert _excess(result, expected) > 1000
        case "rounding":
            assert result.dtype == torch.float32
            assert _excess(result, expected) > 10
        case "dtype":
            assert result.dtype != torch.float32
        case "escape":
            assert others
            assert _excess(result, expected) <= 1
        case "size":
            assert entry.case.chunk not in (16, 32, 64, 128)
            assert _excess(result, expected) <= 1
        case _:
            assert _excess(result, expected) <= 1


def test_tables_are_large_described_and_disjoint() -> None:
    assert len(SPELLINGS) >= 48
    assert len(LOOKALIKES) >= 36
    everything = [*SPELLINGS.items(), *LOOKALIKES.items(), *EITHER.items()]
    assert len({name for name, _ in everything}) == len(everything)
    for name, entry in everything:
        assert entry.about, f"{name} says nothing about itself"
        assert entry.differs in KINDS, name
    assert not [name for name, entry in SPELLINGS.items() if entry.differs]
    assert all(entry.differs for entry in LOOKALIKES.values())


def test_no_two_spellings_have_the_same_body() -> None:
    bodies: dict[str, str] = {}
    for name, entry in SPELLINGS.items():
        source = inspect.getsource(entry.function).split('"""')[-1].strip()
        assert source not in bodies, f"{name} repeats {bodies[source]}"
        bodies[source] = name


def test_inputs_repeat_and_reach_both_sides_of_the_threshold() -> None:
    case = Case()
    first, again = case.inputs(), case.inputs()
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    raw, _, bias = case.draw()
    pre = raw if bias is None else raw + bias
    assert pre.max() > 20 and pre.min() < -20


def test_meaning_restarts_at_every_chunk_and_carries_into_the_tail() -> None:
    case = Case(tokens=40, chunk=16, channels=1, heads=1, batch=1, bias=None, out="t")
    sums = case.meaning()
    raw, A_log, _ = case.draw()
    gates = -A_log.double().exp().flatten() * torch.nn.functional.softplus(raw.double().flatten())
    assert sums.shape == (48,)
    torch.testing.assert_close(sums[16], gates[16])
    torch.testing.assert_close(sums[17], gates[16] + gates[17])
    torch.testing.assert_close(sums[40:], sums[39].expand(8))


def test_arrange_agrees_with_permute() -> None:
    value = torch.arange(2 * 6 * 3 * 5.0).view(2, 6, 3, 5)
    expected = value.view(2, 3, 2, 3, 5).permute(0, 3, 1, 2, 4)
    assert torch.equal(arrange(value, "bhnck", chunk=2), expected)
    assert torch.equal(arrange(value, "zt1k"), value.transpose(1, 2).reshape(6, 6, 1, 5))
    with pytest.raises(AssertionError, match="drops an axis"):
        arrange(value, "bth")
