"""Stand-ins for the delta rule functions of Hugging Face models: one call of `chunk_delta_rule` in place of a loop.

transformers spells the recurrence twice, over chunks of a prompt and token by token for decoding. Both compute what
the op computes, in float32, from [B, T, H, K or V] tensors and a log decay per head [B, T, H] or per channel
[B, T, H, K], with 1 / sqrt(K) as scale and 1e-6 under the root of the normalisation. The output has the dtype of the
query, the state is float32.

A stand-in takes the arguments of the function it replaces. Whatever the op cannot serve goes to that function, with
one logged reason. The stand-ins are plain Python that Dynamo traces: a graph holds the op as a single node.

Dims: B batch, T tokens, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from fusion_passes.ops.chunk_delta_rule import chunk_delta_rule

log = logging.getLogger("fusion_passes.transformers")

Tensor = torch.Tensor
Result = tuple[Tensor, "Tensor | None"]

# Head sizes that the kernels are made and tested for; the reference on a CPU takes any.
GPU_HEAD_DIMS = (64, 96, 128, 192, 256)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
NORM_EPS = 1e-6
# Bounds of packed sequences, a keyword that no PyTorch function of transformers heeds and some kernels do.
PACKED = "cu_seqlens"

_lock = threading.Lock()
_fallbacks: Counter[tuple[str, str]] = Counter()


# --- the stand-ins ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A function that a stand-in replaces.

    Attributes:
        function: what is called where the op cannot serve a call.
        name: its name in log messages.
        decay_dims: the numbers of axes of the decay that it knows: 3, [B, T, H], or 4, [B, T, H, K].
        heeded: further keyword arguments that it does not ignore.
    """

    function: Callable[..., Result]
    name: str
    decay_dims: tuple[int, ...]
    heeded: tuple[str, ...] = ()


def chunk_call(original: Replaced) -> Callable[..., Result]:
    """A stand-in for a function that computes the rule chunk by chunk."""

    @functools.wraps(original.function, updated=())
    def chunk(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: object,
    ) -> Result:
        reason = obstacle(original, query, key, value, g, beta, initial_state, kwargs)
        if chunk_size < 1:
            reason = "the chunk size is not positive"
        if reason is not None:
            note_fallback(original.name, reason)
            # kernels that serve the original have no chunk size
            size = {} if chunk_size == 64 else {"chunk_size": chunk_size}
            return original.function(
                query, key, value, g=g, beta=beta, **size, initial_state=initial_state,
                output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
            )  # fmt: skip
        return _run(query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel)

    return chunk


def recurrent_call(original: Replaced) -> Callable[..., Result]:
    """A stand-in for a function that computes the rule token by token."""

    @functools.wraps(original.function, updated=())
    def recurrent(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: object,
    ) -> Result:
        reason = obstacle(original, query, key, value, g, beta, initial_state, kwargs)
        if reason is not None:
            note_fallback(original.name, reason)
        # A compiled step of one token is a few kernels, in which Inductor does it 10 % sooner than the op's (H200).
        if reason is not None or (torch.compiler.is_compiling() and query.shape[1] == 1):
            return original.function(
                query, key, value, g=g, beta=beta, initial_state=initial_state,
                output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
            )  # fmt: skip
        return _run(query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel)

    return recurrent


def _run(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, final: bool, norm: bool
) -> Result:
    # The op reads any strides but the last; after a causal convolution the tokens lie innermost.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if g.dim() == 4 and g.stride(-1) != 1:
        g = g.contiguous()
    return chunk_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        initial_state=None if state is None else state.contiguous(),
        norm_eps=NORM_EPS if norm else None,
        out_dtype=query.dtype,
        output_final_state=final,
    )


def obstacle(
    original: Replaced, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor | None,
    others: dict[str, object],
) -> str | None:  # fmt: skip
    """Why the op cannot serve a call, or None. Traceable; compares only sizes that the models' code equates."""
    for keyword in original.heeded:
        if others.get(keyword) is not None:
            return f"it is given {keyword}, which the op cannot take"
    for x in (query, key, value, g, beta, state):
        if x is not None:
            if x.dtype not in FLOATS:
                return f"a tensor is {x.dtype}; the op takes bfloat16, float16 and float32"
            if x.requires_grad and torch.is_grad_enabled():
                return "gradients are needed, and the op has none; torch.no_grad() switches them off"
            if x.device.type not in ("cuda", "cpu", "meta"):
                return f"a tensor is on {x.device.type}; the op runs on CUDA GPUs and on CPUs"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or beta.dim() != 3:
        return "the tensors are not [B, T, H, K or V] with beta [B, T, H]"
    if g.dim() not in original.decay_dims:
        return "the decay has another number of axes than the function is known to take"
    batch, _, heads, key_dim = query.shape
    value_dim = value.shape[3]
    tokens = query.shape[:3]
    same = key.shape == query.shape and value.shape[:3] == tokens and beta.shape == tokens and g.shape[:3] == tokens
    if not same or (g.dim() == 4 and g.shape[3] != key_dim):
        return "the tensors differ in batch, tokens or heads"
    if state is not None and state.shape != (batch, heads, key_dim, value_dim):
        return "the initial state is not [B, H, K, V]"
    if query.device.type == "cuda" and (key_dim not in GPU_HEAD_DIMS or value_dim not in GPU_HEAD_DIMS):
        return f"the head size is none of {GPU_HEAD_DIMS}, which the kernels are for"
    return None


# --- what fell back --------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def note_fallback(name: str, reason: str) -> None:
    """Count a call (in compiled code: a trace) that went to the replaced function; the first one is logged."""
    with _lock:
        _fallbacks[name, reason] += 1
        first = _fallbacks[name, reason] == 1
    if first:
        log.warning("%s is called as it was: %s", name, reason)


def fallbacks() -> dict[tuple[str, str], int]:
    """How often calls went to the replaced function, by its name and the reason, since the process began."""
    with _lock:
        return dict(_fallbacks)


# --- what may be replaced --------------------------------------------------------------------------------------------


def stand_in(function: Callable[..., object]) -> Callable[[Replaced], Callable[..., Result]] | None:
    """`chunk_call` or `recurrent_call`, whichever has the parameters and defaults of `function`; None if neither."""
    own = inspect.signature(function).parameters
    for make in (chunk_call, recurrent_call):
        ours = inspect.signature(make(_UNUSED), follow_wrapped=False).parameters
        if [(p.name, p.kind) for p in own.values()] == [(p.name, p.kind) for p in ours.values()] and all(
            p.default in (inspect.Parameter.empty, ours[name].default) for name, p in own.items()
        ):
            return make
    return None


_UNUSED = Replaced(chunk_delta_rule, "", ())


def decay_dims(function: Callable[..., Result], *, chunked: bool) -> tuple[int, ...]:
    """For which numbers of axes of the decay, 3 and 4, a function gives what the op gives.

    Both are called with small random tensors on the CPU, for several chunks of which the last is ragged, with and
    without the optional arguments.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return tuple(dims for dims in (3, 4) if all(_agree(*pair) for pair in _results(function, chunked, dims)))


def _results(function: Callable[..., Result], chunked: bool, dims: int) -> Iterator[tuple[Result | None, Result]]:
    """Results of the function (None where it raises) and of the op."""
    batch, tokens, heads, key_dim, value_dim = 2, 5, 3, 8, 4
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    query, key = draw(batch, tokens, heads, key_dim), draw(batch, tokens, heads, key_dim)
    value = draw(batch, tokens, heads, value_dim)
    decay = -draw(batch, tokens, heads, key_dim).abs() if dims == 4 else -draw(batch, tokens, heads).abs()
    beta = draw(batch, tokens, heads).sigmoid()
    for state, norm in ((None, True), (draw(batch, heads, key_dim, value_dim), True), (None, False)):
        expected = _run(query, key, value, decay, beta, state, True, norm)
        extra = {"chunk_size": 4} if chunked else {}
        found: Result | None
        try:
            found = function(
                query, key, value, g=decay, beta=beta, initial_state=state, output_final_state=True,
                use_qk_l2norm_in_kernel=norm, **extra,
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError, IndexError):
            found = None  # it knows the other form of decay
        yield found, expected


def _agree(found: Result | None, expected: Result) -> bool:
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    return all(
        isinstance(a, Tensor) and b is not None and a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(found, expected)
    )
