"""The optimizer steps at which a run logs, measures and saves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """Intervals in optimizer steps. The last step logs, measures and saves in any case.

    evaluate_every: 0 for a run that measures nothing (it has no `evaluate`). generate_every: of clips of prompts, which
    the start makes as well; 0 for a run without. dead_after: from this step on, the run
    reports adapter layers whose weights have not changed.
    """

    steps: int
    log_every: int
    evaluate_every: int
    save_every: int
    generate_every: int = 0
    dead_after: int = 20

    def logs(self, step: int) -> bool:
        """Whether a row of training metrics is written after this step."""
        return step % self.log_every == 0 or self.is_last(step)

    def measures(self, step: int) -> bool:
        return _due(step, self.evaluate_every) or self.is_last(step)

    def generates(self, step: int) -> bool:
        return self.generate_every > 0 and (step % self.generate_every == 0 or self.is_last(step))

    def saves(self, step: int) -> bool:
        return _due(step, self.save_every) or self.is_last(step)

    def is_last(self, step: int) -> bool:
        return step >= self.steps


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
