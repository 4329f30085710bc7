"""Which numbers the constructors of the algorithms take. A number outside its range could only hurt: NaN makes every
comparison false, an infinite weight makes the loss NaN, and a negative coefficient pays for what it should prevent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple


class Range(NamedTuple):
    """A finite number of a range.

    :param least: the smallest value.
    :param most: the largest value.
    :param whole: whether the value must be a whole number.
    :param least_is_in: whether the smallest value itself belongs to the range.
    """

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    least_is_in: bool = True

    def check(self, name: str, value: Any) -> None:
        """
        :param name: the name of the argument.
        :param value: the argument.
        :raises ValueError: if the value is not in the range.
        """
        kind, words = (Integral, "a whole") if self.whole else (Real, "a finite")
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            raise ValueError(f"Expected {name} to be {words} number{self._limits()}, got {value!r}.")
        number = float(value)
        if number > self.most or number < self.least or (number == self.least and not self.least_is_in):
            raise ValueError(f"Expected {name}{self._limits()}, got {value}.")

    def _limits(self) -> str:
        if math.isfinite(self.most):
            return f" between {self.least:g} and {self.most:g}"
        if math.isfinite(self.least):
            return f" {'>=' if self.least_is_in else '>'} {self.least:g}"
        return ""


ANY = Range()
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, least_is_in=False)
SHARE = Range(0, 1)
COUNT = Range(0, whole=True)
AT_LEAST_ONE = Range(1, whole=True)

RANGES = {
    # of every algorithm
    "learning_rate": NOT_NEGATIVE,
    "n_episodes": AT_LEAST_ONE,
    "batch_size": AT_LEAST_ONE,
    "n_epochs": AT_LEAST_ONE,
    "gamma": SHARE,
    "max_grad_norm": POSITIVE,
    "kl_coef": ANY,  # the KL controller says more of these two, and does so whenever they are set
    "kl_target": ANY,
    "max_bad_updates": COUNT,
    "missing_eos_penalty": ANY,
    "micro_batch_tokens": AT_LEAST_ONE,
    "max_lag": COUNT,
    "importance_cap": POSITIVE,
    "importance_bound": Range(1, least_is_in=False),
    "stats_window_size": AT_LEAST_ONE,
    "verbose": COUNT,
    "seed": COUNT,
    # of those with a ratio
    "clip_range": NOT_NEGATIVE,
    "clip_range_high": NOT_NEGATIVE,
    "dual_clip": Range(1, least_is_in=False),
    "target_kl": POSITIVE,
    "trust_region": POSITIVE,
    "positive_lm_coef": NOT_NEGATIVE,
    "positive_score": ANY,
    # of those with a critic or another baseline
    "gae_lambda": SHARE,
    "gae_lambda_value": SHARE,
    "length_adaptive_alpha": POSITIVE,
    "clip_range_vf": NOT_NEGATIVE,
    "vf_coef": NOT_NEGATIVE,
    "ent_coef": ANY,  # a negative one makes the policy more certain
    "critic_learning_rate": NOT_NEGATIVE,
    "critic_epochs": COUNT,
    "critic_warmup_episodes": COUNT,
    "critic_warmup_epochs": AT_LEAST_ONE,
    "baseline_decay": SHARE,
    # of those that sample more
    "n_branches": AT_LEAST_ONE,
    "branch_every": AT_LEAST_ONE,
    "max_sampling_rounds": AT_LEAST_ONE,
}
SCHEDULES = ("learning_rate", "critic_learning_rate")  # which may be functions as well


def check_ranges(arguments: Mapping[str, Any]) -> None:
    """
    :param arguments: arguments of a constructor by name. Those that are None, those that are schedules, and names that
        are not listed in ``RANGES`` are passed over.
    :raises ValueError: if a number is not in its range.
    """
    for name, allowed in RANGES.items():
        value = arguments.get(name)
        if value is not None and not (name in SCHEDULES and callable(value)):
            allowed.check(name, value)


SB3_ARGUMENTS = {
    "n_steps": "a rollout is whole texts here, n_episodes of them",
    "use_sde": "it is for continuous actions, and tokens are discrete",
    "sde_sample_freq": "it is for continuous actions, and tokens are discrete",
    "rollout_buffer_class": "it is EpisodeBuffer",
    "rollout_buffer_kwargs": "reference, kl_coef and kl_estimator are arguments of their own",
    "use_rms_prop": "policy_kwargs={'optimizer_class': ...} chooses the optimiser",
    "rms_prop_eps": "policy_kwargs={'optimizer_kwargs': {'eps': ...}} sets it",
}
"""What to say of the arguments of SB3's algorithms that those of this package don't take."""
