"""What happens to a value between its load and its cast: the steps of `mla_kv_pack`, written as a short text.

    ""                              the value as it is
    "*s"   "/s"   "*1/s"            times the scale, divided by it, times its reciprocal
    "*0.25"                         times a number
    "clamp(-240.0,240.0)"           cut off at both ends; NaN stays NaN

Steps are separated by spaces and taken from left to right, each rounded to float32: "*s *0.25 clamp(-240.0,240.0)".
Each of the three kinds occurs at most once. Products and quotients are those of IEEE arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
import re

import torch

Tensor = torch.Tensor

# How a step multiplies by the scale tensor; the position is the number by which the kernel knows it.
SCALES = ("*s", "/s", "*1/s")
FACTOR, CLAMP = 4, 5
BITS = 3  # of a step's number

# Stands for a bound that is not there: beyond it every cast saturates, and a kernel's source cannot spell infinity.
UNBOUNDED = 3e38

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_FACTOR = re.compile(rf"\*({_NUMBER})")
_CLAMP = re.compile(rf"clamp\(({_NUMBER}),({_NUMBER})\)")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Parsed steps.

    Attributes:
        order: numbers of the steps: 1 to 3 as in `SCALES`, FACTOR, CLAMP.
        factor, low, high: the numbers of the steps that have some.
    """

    order: tuple[int, ...] = ()
    factor: float = 1.0
    low: float = -UNBOUNDED
    high: float = UNBOUNDED

    @property
    def scaled(self) -> bool:
        """Whether a scale tensor is needed."""
        return any(number <= len(SCALES) for number in self.order)

    @property
    def code(self) -> int:
        """The order as one number, the first step in the lowest bits."""
        return sum(number << BITS * place for place, number in enumerate(self.order))

    def __str__(self) -> str:
        words = {FACTOR: f"*{self.factor!r}", CLAMP: f"clamp({self.low!r},{self.high!r})"}
        return " ".join(words.get(number) or SCALES[number - 1] for number in self.order)


def parse(text: str) -> Steps:
    """The steps that a text spells.

    Raises:
        ValueError: an unknown step, a kind that occurs twice, or a number that float32 does not have.
    """
    order: list[int] = []
    numbers: dict[str, float] = {}
    for word in text.split():
        if word in SCALES:
            order.append(1 + SCALES.index(word))
        elif found := _FACTOR.fullmatch(word):
            order.append(FACTOR)
            numbers["factor"] = float(found[1])
        elif found := _CLAMP.fullmatch(word):
            order.append(CLAMP)
            numbers |= {"low": float(found[1]), "high": float(found[2])}
        else:
            known = ", ".join(repr(scale) for scale in SCALES)
            raise ValueError(f"a step must be one of {known}, '*number' or 'clamp(low,high)', got {word!r} in {text!r}")
    kinds = [0 if number < FACTOR else number for number in order]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"each kind of step (scale, number, clamp) may occur once, got {text!r}")
    for name, value in numbers.items():
        if not math.isfinite(value) or abs(value) > torch.finfo(torch.float32).max:
            raise ValueError(f"{name} must be a float32 number, got {value!r} in {text!r}")
    steps = Steps(tuple(order), **numbers)
    if steps.low > steps.high:
        raise ValueError(f"clamp must have low <= high, got {text!r}")
    return steps


def apply(value: Tensor, scale: Tensor | None, steps: Steps) -> Tensor:
    """The value after its steps: float64 if it is, else float32. The scale has one element."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    value = value.to(dtype)
    factor = torch.ones((), dtype=dtype, device=value.device) if scale is None else scale.reshape(()).to(dtype)
    for number in steps.order:
        if number == FACTOR:
            value = value * steps.factor
        elif number == CLAMP:
            value = value.clamp(steps.low, steps.high)
        elif SCALES[number - 1] == "*s":
            value = value * factor
        else:
            value = value / factor if SCALES[number - 1] == "/s" else value * factor.reciprocal()
    return value


def saturating_cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` rounded to nearest even; beyond the range of a float8 type its largest number, NaN stays NaN.

    Inductor and Triton cast to float8 so. Eager PyTorch up to 2.11 gives NaN (e4m3fn) or infinity (e5m2) instead.
    """
    if dtype.itemsize > 1:
        return value.to(dtype)
    limits = torch.finfo(dtype)
    return value.clamp(limits.min, limits.max).to(dtype)
