"""Legality that holds for every fusion: devices, dtypes, roundings, escapes and mutation, each with a reason."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch._inductor import config as inductor_config
from torch.fx import Node

from fusion_passes import advice, cone
from fusion_passes.fusion import Because, Context, Fusion, Reason, Site, dtype_name
from fusion_passes.records import source_of


def common_reason(fusion: Fusion, site: Site, context: Context) -> Reason:
    """Why the site must be left alone, whatever the fusion, or None."""
    return (
        devices(site)
        or dtypes(fusion, site)
        or roundings(site)
        or escapes(site, context)
        or mutations(site, context)
    )


def devices(site: Site) -> Reason:
    """All leaves and the result live on one device."""
    found = {str(n.meta["val"].device) for n in (*site.leaves.values(), *site.outputs)}
    if len(found) == 1:
        return None
    return Because(f"its tensors live on different devices: {', '.join(sorted(found))}", "move them to one device")


def dtypes(fusion: Fusion, site: Site) -> Reason:
    """Every leaf has a dtype that the fused op reads."""
    for name, leaf in site.leaves.items():
        dtype = leaf.meta["val"].dtype
        if dtype not in fusion.dtypes:
            allowed = ", ".join(dtype_name(d) for d in fusion.dtypes)
            reason = f"{name} is {dtype_name(dtype)}; the fused op reads {allowed}"
            return Because(reason, advice.stored(name, fusion.dtypes))
    return None


def roundings(site: Site) -> Reason:
    """Intermediate roundings may go where Inductor itself drops them, and only there."""
    if site.roundings and inductor_config.emulate_precision_casts:
        node = site.roundings[0]
        dtype = dtype_name(node.meta["val"].dtype)
        reason = (
            f"an intermediate is rounded to {dtype} ({node.name}), which the fused op does not do and "
            "emulate_precision_casts asks to keep"
        )
        return Because(reason, "compile without the option emulate_precision_casts")
    return None


def escapes(site: Site, context: Context) -> Reason:
    """No large intermediate of the site is needed by anything else, but for those that it shares.

    Small ones (an eighth of the smallest result or less, such as a per-head factor) are simply computed again.
    """
    sizes = context.sizes[0]
    large = min(map(sizes.numel, site.outputs)) // 8
    consumed = site.interior | {site.anchor, *site.outputs}
    for node in sorted(site.interior - {*site.outputs} - site.shared):
        if not isinstance(node.meta.get("val"), torch.Tensor) or sizes.numel(node) <= large:
            continue
        if any(cone.carries(node, leaf) for leaf in site.leaves.values()):
            continue
        for user in node.users:
            if user in consumed or user.target is operator.getitem or _is_dead(user):
                continue
            what = f"an intermediate ({node.name}, {_what(node)})"
            if user.op == "output":
                reason = f"{what} is returned by the graph or saved for the backward pass"
                return Because(reason, advice.KEPT)
            where = source_of(user)
            reason = f"{what} is used elsewhere, by {user.name}{f' at {where}' if where else ''}"
            return Because(reason, "have that use read what the fusion reads or returns, if the model can do without")
    return None


def _is_dead(node: Node) -> bool:
    """Is `node` one that nothing uses, such as a view that a write went through?"""
    return node.op == "call_function" and not node.is_impure() and all(map(_is_dead, node.users))


def mutations(site: Site, context: Context) -> Reason:
    """No leaf's memory is written between the first read in the subgraph and the last."""
    storages = {_storage(leaf): name for name, leaf in site.leaves.items()}
    for writer in writers(min(site.interior | {site.anchor}).next, max(site.outputs)):
        written = [_storage(source) for source in writer.all_input_nodes]
        for name in (storages[storage] for storage in written if storage in storages):
            reason = f"{name} is written by {writer.name} between its read and its use"
            return Because(reason, f"write to {name} before it is read, or after the last use")
    return None


def writers(first: Node, end: Node) -> Iterator[Node]:
    """Nodes from `first` on and before `end` that write into a tensor that they are given."""
    node = first
    while node < end:
        if _mutates(node):
            yield node
        node = node.next


def _mutates(node: Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator) and "mutation" in target.name()


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _what(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]
