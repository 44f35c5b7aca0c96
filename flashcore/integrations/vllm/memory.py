"""What all groups of layers of an engine share: taken once, told, and refused where it is too much.

    builders join ─► the caches are there ─► prepare: workspace, scratch, kernels, a view of each

vLLM makes builders inside the memory pool that its sleep mode discards, so nothing is allocated
then. `prepare` runs before the first forward, outside of that pool and of CUDA graphs.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

import torch

from flashcore.integrations.vllm import versions
from flashcore.integrations.vllm.support import ELSEWHERE
from flashcore.serving import capacity, expanding, planners, warmup
from flashcore.serving.counters import Counters, FaultLog
from flashcore.serving.planners import Memory
from flashcore.serving.shapes import NotServed
from flashcore.serving.views import View
from flashcore.sm90.expansion_scratch import ExpansionScratch
from flashcore.sm90.planner_scratch import PlannerScratch

if TYPE_CHECKING:
    from flashcore.integrations.vllm.groups import Group

logger = logging.getLogger(__name__)

GUIDE = "docs/vllm.md"
_FAULT_STEPS = 1000  # forwards after which faults that go on are told again
_engines: WeakValueDictionary[int, EngineMemory] = WeakValueDictionary()


def memory_of(config: Any) -> EngineMemory:
    """Of the engine of a VllmConfig: its target and draft models have one cache configuration."""
    key = id(config.cache_config)
    found = _engines.get(key)
    if found is None:
        found = _engines[key] = EngineMemory(config)
    return found


class EngineMemory:
    """Workspace and scratch of an engine's groups, which attend one after another, and their log.

    It lives as long as a group of the engine does.
    """

    def __init__(self, config: Any):
        self.cache_config = config.cache_config  # its id is taken while this lives
        self.groups: WeakSet[Group] = WeakSet()
        self.views: list[View] = []
        self.workspace: torch.Tensor | None = None
        self.expansion: ExpansionScratch | None = None  # of the groups that were prepared last
        self._bytes = 0
        self._teller: Group | None = None
        quiet = config.parallel_config.rank != 0
        self._counters = {
            mode: Counters(mode, 1, quiet) for mode in ("decode", "verify", "prefill")
        }
        self._faults = FaultLog(self.views, _FAULT_STEPS, quiet, GUIDE)
        self._interval = versions.log_interval()
        self._due = time.monotonic() + self._interval
        self._mode = "decode"
        self._quiet = quiet

    def prepare(self) -> None:
        """Views of all groups whose caches are there: takes memory, compiles and launches kernels.

        Raises NotServed where all of it together is more than plans may take.
        """
        groups = [group for group in self.groups if group.view is None and group.num_pages]
        groups.sort(key=lambda group: (group.model.full is None, group.names))
        device = groups[0].model.device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first forward of flashcore attention is in a CUDA graph")
        scratch = None
        self.expansion = None
        if planners.on_kernels(device):
            elements = max(group.workspace_elements() for group in groups)
            if self.workspace is not None:
                elements = max(elements, self.workspace.numel())
            sizes = [group.scratch_sizes() for group in groups]
            batch, entries, segments, pages = map(max, zip(*sizes, strict=True))
            most = (batch, entries, segments, pages)
            invariant = groups[0].limits.batch_invariant
            self._check(groups, elements, PlannerScratch.bytes_of(*most, invariant))
            if self.workspace is None or self.workspace.numel() < elements:
                self.workspace = torch.empty(elements, dtype=torch.float32, device=device)
            scratch = PlannerScratch(*most, chunks=invariant, device=device)
            layers = [group.layers_to_expand() for group in groups]
            self.expansion, more = expanding.room_to_expand(layers, self._bytes)
            self._bytes += more
        memory = Memory(self.workspace, scratch, self.expansion)
        for group in groups:
            self.views.append(group.make_view(memory))
        if self.workspace is not None:
            self._launch_all(groups)
        self._teller = groups[0]
        if not self._quiet:
            logger.info("%s", self.describe(groups))

    def _check(self, groups: list[Group], elements: int, scratch: int) -> None:
        """The bytes that all groups take together."""
        new = scratch + 4 * elements + sum(group.bytes(elements) for group in groups)
        if self.workspace is not None:
            new -= self.workspace.nbytes
        self._bytes += new
        most = capacity.budget(groups[0].model.device)
        if self._bytes > most:
            raise NotServed(
                f"{len(groups)} groups of layers whose plans would take "
                f"{self._bytes / 2**20:.0f} MiB (at most {most / 2**20:.0f})",
                f"set {capacity.ENVIRONMENT}, or use fewer --max-num-seqs or {ELSEWHERE}",
            )

    def _launch_all(self, groups: list[Group]) -> None:
        """Compile, load and launch every kernel that a forward can ask for."""
        assert self.workspace is not None
        of_group = [group.wanted_kernels() for group in groups]
        needed = list(dict.fromkeys(chain.from_iterable(of_group)))
        with warmup.compiled(needed, self.workspace.device):
            for group, wanted in zip(groups, of_group, strict=True):
                for kind, bare in group.warmup_caches(self.workspace):
                    cache = replace(bare, expansion=self.expansion if group.model.fp8 else None)
                    warmup.run_all(group.model, kind, cache, wanted, False)

    def describe(self, groups: list[Group]) -> str:
        """What serves, in one line."""
        path = "Hopper kernels" if self.workspace is not None else "torch operators"
        kinds = ", ".join(dict.fromkeys(group.describe() for group in groups))
        limits, count = groups[0].limits, len(groups)
        rule = ", batch-invariant" if limits.batch_invariant else ""
        room = max(view.room.entries for view in self.views)
        rest = expanding.describe(groups[0].model, self.expansion)
        return (
            f"flashcore attention: {path}, {count} group{'s' * (count > 1)} of layers: "
            f"{kinds}{rule}, up to {limits.batch} sequences, {limits.queries} new tokens and "
            f"{room} pages at once{rest}, buffers {self._bytes / 2**20:.0f} MiB"
        )

    def step(self, group: Group, mode: str) -> None:
        """One more forward: tell the faults before it, and at vLLM's interval what was shared."""
        if group is not self._teller or group.view is None:
            return
        self._faults.look()
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._interval
            planner = group.view.planner
            self._counters[self._mode].step(planner.stats(), planner.outcome())
        self._mode = mode
