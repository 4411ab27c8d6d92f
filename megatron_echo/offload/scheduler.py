"""Plans by schedule: learnt from recorded steps, kept, and taken up again when one returns."""

import dataclasses
import logging
from collections.abc import Hashable
from itertools import accumulate, pairwise

from megatron_echo.copy_lanes import Backend
from megatron_echo.offload.config import OffloadConfig
from megatron_echo.offload.recorder import StepRecord
from megatron_echo.offload.schedule import Plan, Timeline, make_plan

logger = logging.getLogger(__name__)

_MOST_PLANS = 8


class Scheduler:
    """Chooses the plan of the next step: the one of a step like the last, if it is known."""

    def __init__(self, config: OffloadConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._plans: dict[Hashable, Plan] = {}
        self._observed: Timeline | None = None
        self._observations = 0
        self.plan: Plan | None = None  # for the next step; None while there is something to learn

    @property
    def wants_times(self) -> bool:
        """Whether the next step should be timed."""
        return self.plan is None and self._backend.link is not None

    def learn(self, record: StepRecord) -> None:
        """Take a complete step into account."""
        timeline = record.timeline()
        self.plan = self._plans.get(timeline.signature)
        if self.plan is not None:
            return
        if self._backend.link is not None and timeline.times is None:
            return  # it departed from a plan; the next one is timed
        self._observe(timeline)
        if self._observations < self._config.learning_steps and timeline.times is not None:
            return
        self.plan = self._make_plan(self._observed or timeline)
        self._plans[timeline.signature] = self.plan
        if len(self._plans) > _MOST_PLANS:
            del self._plans[next(iter(self._plans))]
        self._observed, self._observations = None, 0

    def _observe(self, timeline: Timeline) -> None:
        """Keep the shortest time between each two marks of equal steps."""
        last = self._observed
        if last is None or last.signature != timeline.signature:
            self._observed, self._observations = timeline, 1
            return
        self._observations += 1
        if last.times and timeline.times:
            spans = ([b - a for a, b in pairwise(t.times or ())] for t in (last, timeline))
            shortest = accumulate(map(min, *spans), initial=0)
            timeline = dataclasses.replace(timeline, times=tuple(shortest))
        self._observed = timeline

    def _make_plan(self, timeline: Timeline) -> Plan:
        config = self._config
        plan = make_plan(
            timeline, self._backend.link, config.policy, config.fraction, config.target_bytes,
            config.max_slowdown,
        )  # fmt: skip
        kept = zip(timeline.items, plan.kept, strict=True)
        logger.info(
            "Offload plan: %d of %d MiB in %d storages, at most %d MiB on the device",
            sum(item.nbytes for item, reason in kept if reason is None) >> 20,
            sum(item.nbytes for item in timeline.items) >> 20,
            len(timeline.items),
            plan.peak_bytes >> 20,
        )
        return plan
