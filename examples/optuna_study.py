"""An Optuna study: PPO's learning rate and its price of the KL divergence, on the built-in task.

pip install "textrlhf[study]"
python -m examples.optuna_study --n-trials 20

What is maximised is the gold score of held-out texts. No trial is trained on it, so that trials with different prices
can be compared. It is measured while a trial is running as well, and Optuna ends the trials that fall behind. The study
is kept in a file of SQLite: the same command goes on with it, also beside another one that is running.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import PPO, make_vec_env
from agents.rollouts.sampling import sample_texts

if TYPE_CHECKING:
    import optuna


MEASUREMENTS = 8  # of a trial, the last one after its training


class Evaluation(BaseCallback):
    """Tells Optuna the gold score of held-out texts between two rollouts, and ends the trial if Optuna says so.

    :param trial: the trial.
    :param n_texts: the number of texts.
    :param every: the number of tokens between two measurements.
    """

    def __init__(self, trial: optuna.Trial, n_texts: int, every: int) -> None:
        super().__init__()
        self.trial = trial
        self.every = every
        env_kwargs = {"prompts": "builtin:eval", "metrics": {"gold_score": "sentiment"}}
        self.held_out = make_vec_env("TextRLHF-v0", n_envs=n_texts, env_kwargs=env_kwargs).vector_env
        self.gold_score = float("nan")
        self._due = every

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        import optuna

        if self.num_timesteps >= self._due:
            self._measure(self._due)
            self._due += self.every
            if self.trial.should_prune():
                raise optuna.TrialPruned

    def _on_training_end(self) -> None:
        self._measure(MEASUREMENTS * self.every)

    def _measure(self, step: int) -> None:
        policy: Any = self.model.policy
        with torch.random.fork_rng():  # the same random numbers every time, without changing those of the training
            torch.manual_seed(0)
            texts = sample_texts(policy, self.held_out, list(self.held_out.prompts[: self.held_out.num_envs]))
        self.gold_score = float(np.mean([text["gold_score"] for text in texts]))
        # Optuna compares what trials report at the same step. They write other texts, so that hardly two of them would
        # ever have the same number of tokens: what counts is the number at which the measurement was due.
        self.trial.report(self.gold_score, step)


def train(trial: optuna.Trial, total_timesteps: int, n_episodes: int, n_texts: int) -> float:
    """
    :param trial: the trial, which chooses the two numbers.
    :param total_timesteps: the number of tokens of its training.
    :param n_episodes: the number of texts of a rollout.
    :param n_texts: the number of held-out texts of a measurement.
    :return: their mean gold score after the training.
    """
    ppo = PPO(
        "CausalLMPolicy",
        make_vec_env("TextRLHF-v0", n_envs=n_episodes),
        learning_rate=trial.suggest_float("learning_rate", 3e-5, 3e-3, log=True),
        kl_coef=trial.suggest_float("kl_coef", 0.01, 0.3, log=True),
        n_episodes=n_episodes,
        policy_kwargs={"model": "builtin"},
        seed=0,
    )
    evaluation = Evaluation(trial, n_texts, every=total_timesteps // MEASUREMENTS)
    ppo.learn(total_timesteps, callback=evaluation)
    return evaluation.gold_score


def main(
    n_trials: int = 20,
    storage: str = "sqlite:///optuna_study.db",
    total_timesteps: int = 20_000,
    n_episodes: int = 64,
    n_texts: int = 128,
) -> optuna.Study:
    """
    :param n_trials: the number of trials that are added to the study.
    :param storage: where Optuna keeps it.
    :param total_timesteps: the number of tokens of each trial.
    :param n_episodes: the number of texts of a rollout.
    :param n_texts: the number of held-out texts of a measurement.
    :return: the study.
    """
    import optuna

    study = optuna.create_study(
        study_name="ppo",
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )
    study.optimize(lambda trial: train(trial, total_timesteps, n_episodes, n_texts), n_trials)
    for trial in study.trials:
        print(trial.number, trial.state.name, trial.params, trial.value)
    print(f"best: {study.best_params}, gold score {study.best_value:.2f}")
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-trials", type=int, default=20)
    parser.add_argument("--storage", default="sqlite:///optuna_study.db")
    parser.add_argument("--total-timesteps", type=int, default=20_000)
    main(**vars(parser.parse_args()))
