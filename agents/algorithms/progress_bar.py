"""The progress bar of the training loop."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback


class ProgressBar(BaseCallback):
    """Shows the number of tokens generated so far, and the score and the KL divergence of the latest rollout."""

    def __init__(self) -> None:
        super().__init__()
        self._started = False
        self._bar = Progress(
            TextColumn("tokens"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("score {task.fields[score]:+.2f}  KL {task.fields[kl]:z.2f} nats"),
        )

    def _on_training_start(self) -> None:
        self._bar.start()
        self._started = True
        self._task = self._bar.add_task("", total=self.model._total_timesteps, score=float("nan"), kl=float("nan"))

    def _on_step(self) -> bool:
        # The last rollout is finished, and goes beyond what was asked for.
        total = max(self.model._total_timesteps, self.num_timesteps)
        self._bar.update(self._task, completed=self.num_timesteps, total=total)
        return True

    def _on_rollout_end(self) -> None:
        values = self.model.logger.name_to_value
        self._bar.update(self._task, score=values["objective/scores"], kl=values["objective/kl"])

    def close(self) -> None:
        """Remove the bar from the terminal. If the bar was never shown, this does nothing."""
        if self._started:  # rich ends even a bar that never began with an empty line, where there is no terminal
            self._bar.stop()
