"""When a run writes checkpoints: seldom enough to cost next to nothing, and always before it ends."""

from __future__ import annotations

import time
from typing import Any, cast

from stable_baselines3.common.callbacks import BaseCallback

from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.runs.logs import ProgressTable
from agents.state.history import CheckpointHistory

# Unless iterations are counted, the next checkpoint is due after so many times the seconds that the last one took, so
# that checkpoints cost less than 2 % of a run; and after half an hour at the latest.
TIMES_ITS_COST, MOST_SECONDS = 50, 30 * 60


class Checkpoints(BaseCallback):
    """Saves the state of a run between two iterations.

    The state at the start of a rollout stays valid until the update changes the weights. So a run that ends in the
    middle of a rollout, for whatever reason, can still be saved as it was before that rollout (:meth:`save`).

    :param history: where the checkpoints are kept.
    :param table: the log of the run.
    :param every: the number of iterations between two checkpoints; None: by time, as above.
    :param best: the metric of which the checkpoint with the highest value is kept besides; None: there is none.
    :param timesteps: the tokens that the newest checkpoint has seen already; None: there is none.
    """

    def __init__(
        self,
        history: CheckpointHistory,
        table: ProgressTable,
        every: int | None,
        best: str | None,
        timesteps: int | None,
    ) -> None:
        super().__init__()
        self._history = history
        self._table = table
        self._every = every
        self._best = best
        self.timesteps = timesteps
        self._state: dict[str, Any] | None = None
        self._seconds = 0.0  # what the latest one took
        self._since = time.monotonic()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        model = cast(OnPolicyAlgorithm, self.model)
        self._state = model.state()
        if self._every is not None:
            due = model._iterations % self._every == 0
        else:
            due = time.monotonic() - self._since >= min(TIMES_ITS_COST * self._seconds, MOST_SECONDS)
        if due:
            self.save()
        logged = self._table.latest
        if self._best is not None and logged and self._best not in logged:
            raise ValueError(f"Expected best to be one of {sorted(logged)}, got {self._best!r}.")

    def _on_rollout_end(self) -> None:
        self._state = None  # its tensors are those of the policy

    def _on_training_end(self) -> None:
        self._state = cast(OnPolicyAlgorithm, self.model).state()
        self.save()

    def save(self) -> None:
        """Write the state between two iterations, unless an update has been changing it, or nothing is new in it."""
        state = self._state
        if state is None or not state["counters"]["_iterations"]:
            return
        timesteps = state["counters"]["num_timesteps"]
        if timesteps == self.timesteps:
            return
        start = time.monotonic()
        value = self._table.latest.get(self._best) if self._best is not None else None
        self._table.sync()
        self._history.save(state, timesteps, None if value is None else float(value))
        self.timesteps = timesteps
        self._since = time.monotonic()
        self._seconds = self._since - start


class TakePart(BaseCallback):
    """Of several processes one writes the checkpoints. This is for the others, whose random generators they hold: it
    takes the state whenever :class:`Checkpoints` does.
    """

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        cast(OnPolicyAlgorithm, self.model).state()

    def _on_training_end(self) -> None:
        cast(OnPolicyAlgorithm, self.model).state()
