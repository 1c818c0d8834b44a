"""The pass that Inductor runs on every post-grad graph: find, check, rewrite, record."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor.compiler_bisector import CompilerBisector
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes.post_grad import remove_assert_ops
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

from fusion_passes import estimates, expectation, guards, records, registry, rewrite, sketches, tuning, verify
from fusion_passes.estimates import Estimate
from fusion_passes.fingerprint import fingerprint
from fusion_passes.fusion import Because, Context, Fusion, NearMiss, Reason, Refusal, Site
from fusion_passes.padded_products import SetAside, unpadded
from fusion_passes.records import Outcome, Record
from fusion_passes.reports import Report
from fusion_passes.settings import LAUNCH_META, Settings
from fusion_passes.sizes import Sizes, Unsupported, assignments
from fusion_passes.sketches import Drawing

log = logging.getLogger(__name__)

UNKNOWN = Estimate()

# What helps where the subgraph is right and only the profit rule is against it.
_ANYWAY = "the setting always_profitable fuses it all the same, where you want to measure it"


class FusionPass(CustomGraphPass):
    """Replaces the sites of the selected fusions in a post-grad graph; see `fusion_passes.fusion` for the stages.

    The settings are a snapshot taken when the pass is made, so that a graph compiled later, in another thread or
    for the backward pass, is treated alike. Two passes with equal settings are equal.
    """

    def __init__(self, settings: Settings, *, as_if_cuda: bool = False) -> None:
        self.settings = settings
        self.as_if_cuda = as_if_cuda
        self.fusions = registry.select(settings.fusions)
        tuning.check(settings.launch)
        self.expected = expectation.parse(settings.expect)
        selected = (fusion.name for fusion in self.fusions)
        expectation.check_names(self.expected, registry.known(), selected, settings.fusions)
        self.found: list[Record] = []
        self.ran = False  # whether a graph was shown to the pass, as none is where a cache has the code
        # Only taken for `explain`: what is drawn, by fusion and anchor and then by record; and fruitless searches.
        self._sketched: dict[tuple[str, str], Drawing] = {}
        self.drawings: dict[Record, Drawing] = {}
        self.fruitless: list[tuple[str, Node]] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FusionPass) and (self.settings, self.as_if_cuda, self.fusions) == (
            other.settings,
            other.as_if_cuda,
            other.fusions,
        )

    def __hash__(self) -> int:
        return hash((self.settings, self.as_if_cuda))

    def uuid(self) -> str:
        """The part of Inductor's cache keys that stands for us."""
        return fingerprint(self.settings, self.fusions)

    def __call__(self, graph: Graph) -> None:
        try:
            self._run(graph)
        except expectation.ExpectationError:
            raise
        except Exception:
            if self.settings.strict:
                raise
            log.warning("fusion_passes failed on a graph, which is compiled without it", exc_info=True)

    def _run(self, graph: Graph) -> None:
        found = _calls(graph) if self.fusions else []
        if self.fusions:
            with unpadded(graph) as aside:
                self._search(graph, found, aside)
        if any(record.outcome == "fused" for record in found):
            graph.lint()
        if found:
            found = self._publish(graph, found)
        if self.fusions:
            self.ran = True
            records.trace(found)
        if not self.as_if_cuda:
            self._conclude(graph, found)

    def _search(self, graph: Graph, found: list[Record], aside: SetAside) -> None:
        sizes: list[Sizes] = []  # what the graph's symbols may be stays the same whatever is fused
        for fusion in self.fusions:
            candidates = (n for t in fusion.anchors for n in graph.find_nodes(op="call_function", target=t))
            anchors = [n for n in candidates if n not in aside.nodes and fusion.wants(n)]
            if anchors:
                # `torch.export` asserts the dtype of what is cast. Inductor drops that after this pass, and it would
                # count as a use of an intermediate.
                remove_assert_ops(graph)
                # The observer lets the bisector, `disabled_passes` and compile times name each fusion.
                name, module = f"fusion_passes.{fusion.name}", graph.owning_module
                assert module is not None
                observer = GraphTransformObserver(module, name, "post_grad_passes")
                apply = functools.partial(self._apply, fusion, anchors, sizes=sizes, found=found, aside=aside)
                observer.apply_graph_pass(apply)

    def _apply(
        self,
        fusion: Fusion,
        anchors: list[Node],
        graph: Graph,
        *,
        sizes: list[Sizes],
        found: list[Record],
        aside: SetAside,
    ) -> None:
        with unset_fake_temporarily():
            context = Context(graph, self.settings, sizes)
            alive = set(graph.nodes)
            for anchor in anchors:
                if anchor not in alive:
                    continue  # taken by an earlier site, which may provide several values
                reason = self._device_reason(anchor)
                if reason is not None:
                    found.append(_record(fusion, "near_miss", reason, anchor))
                    continue
                if not sizes:
                    sizes.extend(assignments(graph))
                record = self._attempt(fusion, anchor, context)
                if record is not None:
                    found.append(record)
                if self.as_if_cuda:
                    self._keep_sketch(fusion, anchor, record)
                if record is not None and record.outcome == "fused":
                    aside.eliminate_dead_code(graph)
                    alive = set(graph.nodes)
                    context.memo.clear()

    def _device_reason(self, anchor: Node) -> str | None:
        value = anchor.meta.get("val")
        device = value.device.type if isinstance(value, torch.Tensor) else "cuda"
        if device == "cuda" or self.as_if_cuda or (device == "cpu" and self.settings.reference_on_cpu):
            return None
        hint = "; set fusion_passes.reference_on_cpu to run the reference there" if device == "cpu" else ""
        return f"not looked at: the tensors are on {device}, and the kernels run on CUDA GPUs{hint}"

    def _attempt(self, fusion: Fusion, anchor: Node, context: Context) -> Record | None:
        """One candidate through all stages; None if it is of no interest to the fusion."""
        try:
            site = fusion.match(anchor, context)
            if site is None:
                return None
            drawing = sketches.of_site(site, context.sizes[0]) if self.as_if_cuda else None
            before = set(context.graph.nodes) if drawing is not None else set()
            reason = guards.common_reason(fusion, site, context) or fusion.guard(site, context)
            if reason is None and not self.settings.always_profitable:
                reason = fusion.profit(site, context)
                if reason is not None:
                    own = f"{reason.hint}; " if isinstance(reason, Because) and reason.hint else ""
                    reason = Because(reason, own + _ANYWAY)
            if drawing is not None:
                self._sketched[fusion.name, anchor.name] = drawing
            reason = reason or _bisected_away(fusion, anchor)
            if reason is not None:
                return _record(fusion, "refused", reason, anchor)
            estimate = estimates.of_site(site, context.sizes[0])
            if site.rewrite is not None:
                site.rewrite()
            else:
                build = functools.partial(self._build, fusion, site, context)
                leaves, meta = site.leaves.values(), {LAUNCH_META: self.settings.launch}
                rewrite.replace(context.graph, site.outputs, leaves, build, context.sizes, meta)
            if drawing is not None:
                self._sketched[fusion.name, anchor.name] = sketches.rewritten(drawing, site, context.graph, before)
        except NearMiss as miss:
            return _record(fusion, "near_miss", _said(miss), anchor)
        except Unsupported as unsupported:
            return _record(fusion, "near_miss", f"cannot be evaluated: {unsupported}", anchor)
        except (Refusal, rewrite.MetadataMismatch) as refusal:
            return _record(fusion, "refused", _said(refusal), anchor)
        except Exception as error:
            if self.settings.strict:
                raise
            log.warning("fusion %s failed at %s, which is left alone", fusion.name, anchor.name, exc_info=True)
            return _record(fusion, "refused", f"internal error: {type(error).__name__}: {error}", anchor)
        return _record(fusion, "fused", site.summary, anchor, estimate)

    def _keep_sketch(self, fusion: Fusion, anchor: Node, record: Record | None) -> None:
        """For `explain`: what is around an anchor that led to nothing, if no site was drawn there."""
        if record is None:
            self.fruitless.append((fusion.name, anchor))
        elif (fusion.name, anchor.name) not in self._sketched:
            self._sketched[fusion.name, anchor.name] = sketches.around(anchor)

    def _build(self, fusion: Fusion, site: Site, context: Context) -> Sequence[Node]:
        built = fusion.replace(site, context.graph)
        new = (built,) if isinstance(built, Node) else built
        if self.settings.verify:
            verify.check(fusion, site, new, context.sizes[0])
        return new

    def _publish(self, graph: Graph, found: list[Record]) -> list[Record]:
        """Keep and log the records of a graph; returns them with its key."""
        key = hashlib.sha256("".join(n.name for n in graph.nodes).encode()).hexdigest()[:8]
        found = [dataclasses.replace(record, graph=key) for record in found]
        keyed = ((record, self._sketched.get((record.fusion, record.node))) for record in found)
        self.drawings |= {record: drawing for record, drawing in keyed if drawing is not None}
        self._sketched.clear()
        self.found += found
        if not self.as_if_cuda:
            records.remember(found)
        for record in found:
            log.debug("%s %s at %s: %s", record.fusion, record.outcome, record.source or record.node, record.reason)
        fused = sum(record.outcome == "fused" for record in found)
        log.info("graph %s: %d of %d candidate sites fused", key, fused, len(found))
        return found

    def _conclude(self, graph: Graph, found: list[Record]) -> None:
        """Compare with what was expected, and say so where nothing was fused."""
        whole = expectation.of_whole_graph(graph, found)
        if whole is None:
            return
        if self.expected:
            Report(tuple(whole), (expectation.where_counted(),)).expect(self.expected)
        if self.fusions:
            expectation.warn_if_nothing(whole)


class ComposedPass(CustomGraphPass):
    """Several passes in one slot, for torch versions whose slots hold a single callable."""

    def __init__(self, *passes: Any) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> Any | None:
        """The members' uuids; None, which bypasses the caches, if any member has none."""
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if any(not uuid for uuid in uuids) else tuple(uuids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ComposedPass) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)


def members(slot: Any) -> list[Any]:
    """The passes that a slot of Inductor's configuration holds, in order."""
    if slot is None:
        return []
    if isinstance(slot, ComposedPass):
        return list(slot.passes)
    return list(slot) if isinstance(slot, (list, tuple)) else [slot]


def compose(slot: Any, ours: FusionPass) -> Any:
    """A value for the slot in which `ours` runs after the passes that it holds already.

    A pass of ours that another door put there before is replaced, so that no graph is treated twice.
    """
    passes = [p for p in members(slot) if not isinstance(p, FusionPass)] + [ours]
    if len(passes) == 1:
        return ours
    if hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes"):
        return passes
    return ComposedPass(*passes)


def _bisected_away(fusion: Fusion, anchor: Node) -> Reason:
    """Ask Inductor's bisector, which switches post-grad passes off one by one, whether this site may be rewritten."""

    def name() -> str:
        return f"fusion_passes.{fusion.name} at {records.source_of(anchor) or anchor.name}"

    if CompilerBisector.disable_subsystem("inductor", "post_grad_passes", name):
        return "Inductor's bisector is running and has switched this site off"
    return None


def _calls(graph: Graph) -> list[Record]:
    """The ops of this package that the model calls itself, as one bound by `fusion_passes.transformers` does."""
    nodes = (n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload))
    reason = "not searched for: the model calls the op, being bound to it or by name"
    return [
        Record(n.target._opname, "fused", reason, records.source_of(n), n.name)
        for n in nodes
        if n.target.namespace == "fusion_passes"
    ]


def _record(fusion: Fusion, outcome: Outcome, reason: str, anchor: Node, estimate: Estimate = UNKNOWN) -> Record:
    return Record(
        fusion.name,
        outcome,
        str(reason),
        records.source_of(anchor),
        anchor.name,
        saved_bytes=estimate.traffic,
        saved_launches=estimate.launches,
        saved_memory=estimate.held,
        hint=reason.hint if isinstance(reason, Because) else "",
    )


def _said(error: Exception) -> str:
    """What a near miss or refusal was raised with, its hint included."""
    return error.args[0] if error.args and isinstance(error.args[0], Because) else str(error)
