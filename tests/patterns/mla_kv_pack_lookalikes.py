"""What resembles an MLA key and must be left alone, each with the reason that has to be given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.patterns.mla_kv_pack_cases import E4, E5, HEAD, HEADS, NOPE, PE, TOKENS, Table, entry
from tests.patterns.mla_kv_pack_spellings import TOTAL, project

LOOKALIKES: Table = {}


def shared(pe: Tensor) -> Tensor:
    return pe.unsqueeze(1).expand(-1, HEADS, -1)


def key(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """A key that is not cast yet."""
    return torch.cat([project(x, w)[0], shared(pe)], -1)


def scores() -> tuple[Tensor, ...]:
    return torch.randn(2, HEADS, TOKENS, 16).bfloat16(), torch.randn(HEADS, 8).bfloat16()


def with_scale(*shape: int) -> Any:
    def make() -> tuple[Tensor, ...]:
        x, w, pe = (torch.randn(*s).bfloat16() for s in ((TOKENS, 24), (24, HEADS * HEAD), (TOKENS, PE)))
        return x, w, pe, torch.rand(*shape) + 0.5

    return make


@entry(LOOKALIKES, "a part has 1 columns", scores)
def attention_sink(logits: Tensor, sink: Tensor) -> Tensor:
    """One column for every row, as with attention sinks."""
    return torch.cat([logits, sink[:, :1].view(1, HEADS, 1, 1).expand(2, -1, TOKENS, -1)], -1).to(E4)


@entry(LOOKALIKES, "repeated along 2 axes", scores)
def wide_attention_sink(logits: Tensor, sink: Tensor) -> Tensor:
    """Eight columns per head, the same for batches and tokens."""
    return torch.cat([logits, sink.view(1, HEADS, 1, 8).expand(2, -1, TOKENS, -1)], -1).to(E4)


@entry(LOOKALIKES, "the outermost axis", scores)
def shared_by_batches(logits: Tensor, sink: Tensor) -> Tensor:
    """A part that all batches share."""
    part = (sink[:, None] * torch.ones(TOKENS, 1, dtype=sink.dtype)).cumsum(0)
    return torch.cat([logits, part.expand(2, -1, -1, -1)], -1).to(E4)


@entry(LOOKALIKES, "the outermost axis", with_scale(HEADS, PE))
def shared_by_tokens(x: Tensor, w: Tensor, pe: Tensor, learned: Tensor) -> Tensor:
    """A learned part per head that all tokens share."""
    return torch.cat([project(x, w)[0], learned.to(x.dtype).expand(x.shape[0], -1, -1)], -1).to(E4)


@entry(LOOKALIKES, "overlap: columns 8 to 16")
def overlapping_parts(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """The second write covers a part of the first one."""
    k = torch.empty(x.shape[0], HEADS, NOPE, dtype=x.dtype)
    k[..., :NOPE] = project(x, w)[0]
    k[..., NOPE - PE :] = pe.unsqueeze(1)
    return k.to(E4)


@entry(LOOKALIKES, "gap: columns 16 to 24")
def a_gap(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Zeros between the parts."""
    k = torch.zeros(x.shape[0], HEADS, TOTAL + 8, dtype=x.dtype)
    k[..., :NOPE] = project(x, w)[0]
    k[..., NOPE + 8 :] = pe.unsqueeze(1)
    return k.to(E4)


@entry(LOOKALIKES, "gap: columns 24 to 32")
def padded_key(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Zeros behind the parts."""
    k = torch.zeros(x.shape[0], HEADS, TOTAL + 8, dtype=x.dtype)
    k[..., :NOPE] = project(x, w)[0]
    k[..., NOPE:TOTAL] = pe.unsqueeze(1)
    return k.to(E4)


@entry(LOOKALIKES, "from 3 parts")
def three_parts(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Two shared parts."""
    return torch.cat([project(x, w)[0], shared(pe), shared(pe)], -1).to(E4)


@entry(LOOKALIKES, "none of its parts is repeated", with_scale(TOKENS, HEADS, PE))
def nothing_shared(x: Tensor, w: Tensor, pe: Tensor, own: Tensor) -> Tensor:
    """Every head has a second part of its own."""
    return torch.cat([project(x, w)[0], own.to(x.dtype)], -1).to(E4)


@entry(LOOKALIKES, "each of its parts is repeated")
def everything_shared(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Both parts are the same for all heads."""
    return torch.cat([(x @ w)[:, None, :NOPE].expand(-1, HEADS, -1), shared(pe)], -1).to(E4)


@entry(LOOKALIKES, "is returned by the graph")
def wide_key_returned(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """The key is wanted in bfloat16 too."""
    k = key(x, w, pe)
    return k, k.to(E4)


@entry(LOOKALIKES, "is used elsewhere")
def wide_key_used(x: Tensor, w: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """A product with the wide key."""
    k = key(x, w, pe)
    return k.to(E4), k[:, 0] @ k[:, 1].mT


@entry(LOOKALIKES, "is used elsewhere")
def scale_from_the_key_itself(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """The scale is the key's own maximum."""
    k = key(x, w, pe).float()
    return (k / k.abs().amax()).to(E4)


@entry(LOOKALIKES, "one scale for the whole tensor", with_scale(TOTAL))
def scale_per_channel(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> Tensor:
    """A scale for every column."""
    return (key(x, w, pe) * scale).to(E4)


@entry(LOOKALIKES, "one scale for the whole tensor", with_scale(HEADS, 1))
def scale_per_head(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> Tensor:
    """A scale for every head."""
    return (key(x, w, pe).float() / scale).to(E4)


@entry(LOOKALIKES, "one scale for the whole tensor", with_scale(TOKENS, 1, 1))
def scale_per_token(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> Tensor:
    """A scale for every token."""
    return (key(x, w, pe).float() * scale).to(E4)


@entry(LOOKALIKES, "its parts take different steps", scales=2)
def parts_with_scales_of_their_own(x: Tensor, w: Tensor, pe: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Two scales, one for each part."""
    return torch.cat([project(x, w)[0] * a, shared(pe) * b], -1).to(E4)


@entry(LOOKALIKES, "different steps before the cast: none and *s", scales=1)
def only_one_part_scaled(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> Tensor:
    """The shared part alone is scaled."""
    return torch.cat([project(x, w)[0], shared(pe * scale)], -1).to(E4)


@entry(LOOKALIKES, "k_pe is computed by add", with_scale(TOKENS, PE))
def rotary_embedding_in_the_graph(x: Tensor, w: Tensor, pe: Tensor, cos: Tensor) -> Tensor:
    """k_pe is pointwise work, which Inductor does inside of the key's kernel."""
    rotated = pe * cos.to(pe.dtype) + pe.roll(1, -1) * cos.to(pe.dtype)
    return torch.cat([project(x, w)[0], shared(rotated)], -1).to(E4)


@entry(LOOKALIKES, "k_nope is computed by relu")
def activated_projection(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """The projection passes through an activation."""
    kv = torch.relu(x @ w).view(-1, HEADS, HEAD)
    return torch.cat([kv[..., :NOPE], shared(pe)], -1).to(E4)


@entry(LOOKALIKES, "work that Inductor fuses with it")
def fake_quantization(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Cast to float8 and back at once."""
    return key(x, w, pe).to(E4).to(torch.bfloat16) * 2


@entry(LOOKALIKES, "k_scale is computed by mul", scales=2)
def product_of_scales(x: Tensor, w: Tensor, pe: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The scale is worked out on the fly, which Inductor does inside of the key's kernel."""
    return (key(x, w, pe) * (a * b)).to(E4)


@entry(LOOKALIKES, "passes through float8_e5m2")
def cast_twice(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Rounded to e5m2 before e4m3fn."""
    return torch.cat([project(x, w)[0].to(E5).bfloat16(), shared(pe)], -1).to(E4)


@entry(LOOKALIKES, "computed in float64", scales=1)
def double_precision(x: Tensor, w: Tensor, pe: Tensor, scale: Tensor) -> Tensor:
    """The scale is applied in float64."""
    return (key(x, w, pe).double() * scale).to(E4)


@entry(LOOKALIKES, "lie 4 elements apart")
def heads_next_to_one_another(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """A projection whose innermost axis is the heads."""
    kv = (x @ w).view(-1, HEAD, HEADS).transpose(1, 2)
    return torch.cat([kv[..., :NOPE], shared(pe)], -1).to(E4)


@entry(LOOKALIKES, "k_nope has 12 columns")
def odd_width(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """A width that is no multiple of eight."""
    return torch.cat([project(x, w)[0][..., :12], shared(pe)], -1).to(E4)


@entry(LOOKALIKES, "it stays in bfloat16")
def not_cast(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """The key of an ordinary attention."""
    k = torch.empty(x.shape[0], HEADS, TOTAL, dtype=x.dtype)
    k[..., :NOPE] = project(x, w)[0]
    k[..., NOPE:] = pe.unsqueeze(1)
    return k


@entry(LOOKALIKES, "not along the columns")
def one_after_the_other(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """The parts are tokens after tokens."""
    return torch.cat([project(x, w)[0], pe.repeat(1, 2).unsqueeze(1).expand(-1, HEADS, -1)], 0).to(E4)


@entry(LOOKALIKES, "only a part of it is cast")
def cast_in_part(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """The last columns are left out."""
    return key(x, w, pe)[..., : TOTAL - 4].to(E4)


@entry(LOOKALIKES, "lie -1 elements apart")
def columns_reversed(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Columns from last to first."""
    return torch.cat([project(x, w)[0].flip(-1), shared(pe)], -1).to(E4)


@entry(LOOKALIKES, "k_nope is computed by index")
def heads_rolled(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Every head takes the columns of its neighbour."""
    return torch.cat([project(x, w)[0].roll(1, 1), shared(pe)], -1).to(E4)


@entry(LOOKALIKES, "written into a tensor of the caller", lambda: (*with_scale(1)()[:3], torch.empty(
    TOKENS, HEADS, TOTAL, dtype=E4)))  # fmt: skip
def buffer_of_the_caller(x: Tensor, w: Tensor, pe: Tensor, out: Tensor) -> None:
    """The result goes into an argument."""
    out[..., :NOPE] = project(x, w)[0]
    out[..., NOPE:] = pe.unsqueeze(1)


@entry(LOOKALIKES, "the kernel takes one scale, number and clamp", scales=2)
def too_many_scales(x: Tensor, w: Tensor, pe: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Two scales one after the other, each with a rounding of its own."""
    return (key(x, w, pe).float() * a * b).to(E4)


@entry(LOOKALIKES, "different dtypes: bfloat16, float32", with_scale(TOKENS, PE))
def parts_of_different_dtypes(x: Tensor, w: Tensor, pe: Tensor, wide: Tensor) -> Tensor:
    """A float32 k_pe beside a bfloat16 k_nope."""
    return torch.cat([project(x, w)[0].float(), shared(wide)], -1).to(E4)


@entry(LOOKALIKES, "to every 2th column")
def interleaved_parts(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Even and odd columns."""
    k = torch.empty(x.shape[0], HEADS, 2 * PE, dtype=x.dtype)
    k[..., ::2] = project(x, w)[0][..., :PE]
    k[..., 1::2] = pe.unsqueeze(1)
    return k.to(E4)


@entry(LOOKALIKES, "written along axis 0")
def tokens_written_apart(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """The first token is overwritten."""
    k = torch.empty(x.shape[0], HEADS, TOTAL, dtype=x.dtype)
    k[..., :NOPE] = project(x, w)[0]
    k[..., NOPE:] = pe.unsqueeze(1)
    k[:2] = 0.0
    return k.to(E4)


@entry(LOOKALIKES)
def masked_key(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Half of the values are set to zero."""
    k = key(x, w, pe)
    return torch.where(k > 0, k, 0.0).to(E4)


@entry(LOOKALIKES, "work that Inductor fuses with it")
def integers(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Cast to int8."""
    return key(x, w, pe).to(torch.int8)


@entry(LOOKALIKES)
def value_alone(x: Tensor, w: Tensor, pe: Tensor) -> Tensor:
    """Nothing is put together."""
    return project(x, w)[1].to(E4)
