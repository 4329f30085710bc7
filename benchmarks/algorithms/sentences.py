"""From runs to verdicts: estimates with 95 % intervals, claims that they decide, sentences made of claims.

The statistics are rliable's (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264): interquartile means, probability
of improvement, stratified bootstrap intervals over the seeds. No verdict on something random rests on a point estimate.
"""

from __future__ import annotations

import ast
import enum
import io
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rliable import library

BOOTSTRAP_REPETITIONS = 2_000
# Below this a bootstrap over seeds has next to nothing to resample.
FEWEST_SEEDS = 5
# "Never collapses" is not said of fewer.
SEEDS_WITHOUT_COLLAPSE = 10
SMOOTHING = 5  # bins of a learning curve

ALGORITHMS = Path(__file__).parents[2] / "agents" / "algorithms"

Run = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; the interval of a single run is the whole line."""

    value: float
    low: float
    high: float


def bootstrap(statistic: Callable[..., float], *samples: Sequence[float]) -> Estimate:
    """
    :param statistic: of as many arrays ``[n]`` as there are samples.
    :param samples: one value a seed, each resampled
        on its own.
    :return: the statistic with its percentile interval.
    """
    arrays = [np.asarray(sample, float)[:, None] for sample in samples]
    value, low, high = _bootstrap(lambda *x: np.array([statistic(*(a[:, 0] for a in x))]), arrays)
    return Estimate(float(value[0]), float(low[0]), float(high[0]))


def _bootstrap(
    statistic: Callable[..., np.ndarray], arrays: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    :param statistic: of the arrays; returns ``[k]``.
    :param arrays: each ``[n, 1, ...]``, resampled along n.
    :return: the statistic, lower and upper bounds, ``[k]`` each.
    """
    if min(map(len, arrays)) < 2:
        value = statistic(*arrays)
        return value, np.full_like(value, -np.inf), np.full_like(value, np.inf)
    state = np.random.get_state()
    np.random.seed(0)  # rliable draws from NumPy's global generator, whatever generator it is given
    try:
        values, intervals = library.get_interval_estimates({"": arrays}, statistic, reps=BOOTSTRAP_REPETITIONS)
    finally:
        np.random.set_state(state)
    return values[""], intervals[""][0], intervals[""][1]


# The two statistics below are rliable's, written in NumPy: its own go through SciPy's checks of arguments, which make a
# bootstrap fifty times slower.


def iqm(values: Sequence[float] | np.ndarray) -> Any:
    """The mean of the middle half, ``rliable.metrics.aggregate_iqm`` of one task.

    :param values: ``[n, ...]``.
    :return: over n, ``[...]``.
    """
    ordered = np.sort(np.asarray(values, float), axis=0)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut].mean(axis=0)


def spread(values: Sequence[float]) -> float:
    """The standard deviation across seeds; 0 for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def iqm_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """IQM of ours − IQM of theirs."""
    return bootstrap(lambda a, b: iqm(a) - iqm(b), ours, theirs)


def spread_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Standard deviation across seeds of ours − theirs."""
    return bootstrap(lambda a, b: spread(a) - spread(b), ours, theirs)


def probability_of_improvement(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """P(a run of ours > a run of theirs), ties half: ``rliable.metrics.probability_of_improvement`` of one task."""
    return bootstrap(lambda a, b: float(((np.sign(a[:, None] - b) + 1) / 2).mean()), ours, theirs)


def iqm_curve(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    :param curves: ``[n, points]``.
    :return: IQM, lower and upper bound, each ``[points]``, point by point.
    """
    return _bootstrap(lambda x: iqm(x[:, 0]), [curves[:, None]])


# ---------------------------------------------------------------------------------------------------------------- runs


def gains(runs: Sequence[Run]) -> list[float]:
    """Final score − score of the untrained model, one a run."""
    return [run["score"] - run["start"]["score"] for run in runs]


def objectives(runs: Sequence[Run], kl_coef: float) -> list[float]:
    """What is maximised: score − β·KL (nats per episode), one a run; the score where there is no likelihood."""
    return [run["score"] - kl_coef * (run["kl"] or 0.0) for run in runs]


def collapsed(run: Run, start: dict[str, float] | None = None) -> bool:
    """Whether the score fell back under the start, or distinct-2 under a quarter of the start's.

    :param run: a run.
    :param start: by default the run's own.
    """
    start = run["start"] if start is None else start
    return run["score"] < start["score"] or run["distinct_2"] < start["distinct_2"] / 4


def collapses(runs: dict[str, list[Run]], name: str) -> int:
    """
    :param runs: algorithm → its runs.
    :param name: of one.
    :return: how many of its runs collapsed. An actor without a likelihood starts from nothing and is measured by what
        the others start from, the untrained language model.
    """
    start = None if has_likelihood(runs[name]) else untrained(runs)
    return sum(collapsed(run, start) for run in runs[name])


def smoothed_curve(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """
    :param run: with its ``curve``.
    :return: tokens and score ``[1 + bins]``: the untrained model at 0 tokens, then the
        curve under a centred moving average, whose window shrinks at the ends so that it stays centred.
    """
    scores = np.array([point["score"] for point in run["curve"]], float)
    reach = [min(SMOOTHING // 2, i, len(scores) - 1 - i) for i in range(len(scores))]
    smooth = [scores[i - r : i + r + 1].mean() for i, r in enumerate(reach)]
    tokens = [point["tokens"] for point in run["curve"]]
    return np.array([0.0, *tokens]), np.array([run["start"]["score"], *smooth])


def tokens_to(run: Run, target: float) -> float:
    """
    :param run: with its ``curve``.
    :param target: a score.
    :return: tokens at which the smoothed curve first reaches
        it, linearly interpolated; inf where it never does.
    """
    tokens, scores = smoothed_curve(run)
    reached = np.flatnonzero(scores >= target)
    if not len(reached):
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return 0.0
    share = (target - scores[i - 1]) / (scores[i] - scores[i - 1])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def target_score(runs: dict[str, list[Run]]) -> float:
    """80 % of the way from the untrained language model to the end of the best algorithm's smoothed curve (IQM)."""
    start = untrained(runs)["score"]
    names = with_likelihood(runs)  # what no KL holds back may find a word that scores above all texts
    best = max(iqm([smoothed_curve(run)[1][-1] for run in runs[name]]) for name in names)
    return start + 0.8 * (best - start)


def untrained(runs: dict[str, list[Run]]) -> dict[str, float]:
    """What the untrained language model measures, the mean over the runs that start from it."""
    # An algorithm without a likelihood starts from an actor of its own, which counts only where nothing else ran.
    starts = [run["start"] for name in with_likelihood(runs) for run in runs[name]]
    return {key: float(np.mean([start[key] for start in starts])) for key in starts[0]}


def with_likelihood(runs: dict[str, list[Run]]) -> list[str]:
    """The algorithms whose policies have one; all, if there is none."""
    return [name for name in runs if has_likelihood(runs[name])] or list(runs)


def has_likelihood(runs: Sequence[Run]) -> bool:
    """Whether the algorithm's policy has one, and so a KL."""
    return all(run["kl"] is not None for run in runs)


def lines_of_code(path: Path) -> int:
    """
    :param path: a Python file.
    :return: lines that hold code: no blank lines, no comments, no docstrings.
    """
    source = path.read_text()
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in layout
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


# -------------------------------------------------------------------------------------------------------------- claims


class Verdict(enum.IntEnum):
    """Ordered, so that "and" is the minimum and "or" is the maximum."""

    CONTRADICTED = 0
    UNDECIDED = 1
    SUPPORTED = 2

    def __str__(self) -> str:
        return {0: "contradicted", 1: "undecided at this budget", 2: "supported"}[self.value]


@dataclass(frozen=True)
class Claim:
    """Something that the numbers can decide.
    :param text: the claim with its numbers."""

    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Sentence:
    """What everybody repeats, its meaning here, and the evidence.

    :param rule: how it is read.
    :param claims: what decides.
    :param notes: what a reader should know besides.
    :param combine: ``min``: all the claims must hold; ``max``: one is enough.
    """

    text: str
    rule: str
    claims: list[Claim]
    notes: list[str] = field(default_factory=list)
    combine: Callable[[list[Verdict]], Verdict] = min

    @property
    def verdict(self) -> Verdict:
        """Of its claims."""
        return self.combine([claim.verdict for claim in self.claims])


def positive(text: str, estimate: Estimate, *seeds: int) -> Claim:
    """A claim that holds if a quantity is positive.

    :param text: names the quantity.
    :param estimate: of it.
    :param seeds: how many runs each side of it rests on.
    :return: supported if the interval lies above 0, contradicted if below; undecided otherwise, or with too few seeds.
    """
    verdict = Verdict.UNDECIDED
    if min(seeds, default=FEWEST_SEEDS) >= FEWEST_SEEDS:
        if estimate.low > 0:
            verdict = Verdict.SUPPORTED
        elif estimate.high < 0:
            verdict = Verdict.CONTRADICTED
    return Claim(f"{text}: {estimate.value:+.3g} {interval(estimate, '+.3g')}", verdict)


def opposite(claim: Claim) -> Claim:
    """The same evidence for the claim's negation."""
    return Claim(claim.text, Verdict(2 - claim.verdict))


def missing(*names: str) -> Claim:
    """A claim that was not measured."""
    return Claim(f"not measured: {', '.join(names)}", Verdict.UNDECIDED)


def interval(estimate: Estimate, style: str) -> str:
    """As ``[low, high]``; of a single run, ``[one seed]``."""
    return f"[{estimate.low:{style}}, {estimate.high:{style}}]" if np.isfinite(estimate.low) else "[one seed]"


def never_collapses(name: str, runs: Sequence[Run]) -> Claim:
    """Supported by none in ten seeds or more; contradicted by two, as one might be an accident."""
    count = sum(map(collapsed, runs))
    if count >= 2:
        verdict = Verdict.CONTRADICTED
    elif count == 0 and len(runs) >= SEEDS_WITHOUT_COLLAPSE:
        verdict = Verdict.SUPPORTED
    else:
        verdict = Verdict.UNDECIDED
    return Claim(f"`{name}` collapses in {count} of {len(runs)} seeds", verdict)


def spreads_little(name: str, runs: Sequence[Run]) -> Claim:
    """The standard deviation across seeds is under a quarter of the gain."""
    estimate = bootstrap(lambda gain: iqm(gain) / 4 - spread(gain), gains(runs))
    text = f"a quarter of `{name}`'s gain ({iqm(gains(runs)) / 4:.2f}) − its spread ({spread(gains(runs)):.2f})"
    return positive(text, estimate, len(runs))


# ----------------------------------------------------------------------------------------------------------- sentences

STABLE = (
    "Stable: it never collapses (supported by no collapse in at least ten seeds, contradicted by two), **and** the "
    "standard deviation across seeds is under a quarter of the gain, so that only a seed four deviations below the "
    "others would end where it began."
)
FASTER = (
    "P(a run reaches the target score after fewer tokens than a run of the other) lies above one half; runs that don't "
    "reach it tie."
)


@dataclass(frozen=True)
class Evidence:
    """What the sentences are judged by.

    :param runs: algorithm → its runs.
    :param tuning: algorithm → trials, each with ``learning_rate`` and ``objective``.
    :param noise: estimator → ``{"snr", "low", "high", "minus"}``, see ``gradient_noise.py``.
    :param kl_coef: β.
    :param algorithms: directory of the algorithms' files.
    """

    runs: dict[str, list[Run]]
    tuning: dict[str, list[dict[str, Any]]]
    noise: dict[str, dict[str, Any]]
    kl_coef: float
    algorithms: Path = ALGORITHMS

    def lacks(self, *names: str) -> list[str]:
        """Algorithms without runs."""
        return [name for name in names if name not in self.runs]

    def scores(self, name: str) -> list[float]:
        """Final scores of an algorithm."""
        return [run["score"] for run in self.runs[name]]

    @cached_property
    def target(self) -> float:
        """See ``target_score``."""
        return target_score(self.runs)

    def tokens_to_target(self, name: str) -> list[float]:
        """One a run; inf: not reached."""
        return [tokens_to(run, self.target) for run in self.runs[name]]

    def seconds_to_target(self, name: str) -> list[float]:
        """Likewise, in wall time, taking a run's speed as constant."""
        tokens = self.tokens_to_target(name)
        return [t * run["seconds"] / run["tokens"] for t, run in zip(tokens, self.runs[name], strict=True)]

    def faster(self, ours: str, theirs: str, what: Callable[[str], list[float]] | None = None) -> Estimate:
        """P(ours needs less than theirs to reach the target); what is needed: tokens, or ``what``."""
        # Ranks are all that counts, and infinite ones must be numbers for their ties to be seen.
        needed = [np.nan_to_num((what or self.tokens_to_target)(name), posinf=1e18) for name in (ours, theirs)]
        return probability_of_improvement(list(-needed[0]), list(-needed[1]))

    def snr(self, name: str) -> Estimate | None:
        """Gradient signal-to-noise of an algorithm's estimator; with the fitted critic, where it has one."""
        found = self.noise.get(estimator_of(self, name))
        return None if found is None or found["snr"] is None else Estimate(found["snr"], found["low"], found["high"])


def estimator_of(evidence: Evidence, name: str) -> str:
    """The estimator that stands for an algorithm: a critic that knows nothing would say nothing of most of training."""
    return name if name in evidence.noise else f"{name}-fitted"


def tuning_loss(evidence: Evidence, name: str, repetitions: int = BOOTSTRAP_REPETITIONS) -> np.ndarray:
    """What an average of the learning rates tried loses against the one chosen.

    A trial is one run, so its noise is taken from the final runs: each trial is moved by a deviation that some seed
    showed. The chosen trial stays the chosen one, so that this noise doesn't look like a sensitivity.

    :param evidence: with tuning trials.
    :param name: the algorithm, of whose trials none :func:`diverged`.
    :return: ``[1 + repetitions]``: the objective of the trial chosen − the mean of all, then resamples of it.
    """
    trials, runs = evidence.tuning[name], evidence.runs[name]
    chosen = chosen_trial(name, trials, runs)
    final = np.array(objectives(runs, evidence.kl_coef))
    deviations = (final - final.mean()) * np.sqrt(len(final) / max(len(final) - 1, 1))
    noise = np.random.default_rng(0).choice(deviations, (1 + repetitions, len(trials)))
    noise[0] = 0.0
    values = np.array([trial["objective"] for trial in trials]) + noise
    return values[:, chosen] - values.mean(axis=1)


def diverged(trial: dict[str, Any]) -> bool:
    """Whether a tuning trial came to nothing, so that no loss can be made of it."""
    return trial["objective"] is None or not np.isfinite(trial["objective"])


def chosen_trial(name: str, trials: Sequence[dict[str, Any]], runs: Sequence[Run]) -> int:
    """
    :return: index of the trial whose learning rate the runs used.
    :raises ValueError: if there is none.
    """
    used = runs[0]["learning_rate"]
    matches = [i for i, trial in enumerate(trials) if np.isclose(trial["learning_rate"], used, rtol=1e-6)]
    if not matches:
        tried = [trial["learning_rate"] for trial in trials]
        raise ValueError(f"{name} ran with learning rate {used}, but tuning.json tried {tried}: run the tuning again.")
    return matches[0]


def own(runs: dict[str, list[Run]]) -> list[str]:
    """The project's own algorithms: those of other libraries are named after them."""
    return [name for name in runs if not name.startswith(("sb3-", "trl-"))]


def needs_tuning(evidence: Evidence) -> Claim:
    """PPO loses more by an untuned learning rate than the other own algorithms do on average."""
    others = [name for name in own(evidence.runs) if name != "ppo" and name in evidence.tuning]
    if "ppo" not in evidence.tuning or evidence.lacks("ppo") or not others:
        return missing("tuning trials of ppo and of another")
    if broken := [name for name in ("ppo", *others) if any(map(diverged, evidence.tuning[name]))]:
        return missing(f"a loss of {', '.join(f'`{name}`' for name in broken)}, of whose trials some diverged")
    # Independent draws of noise: resamples of one algorithm are shuffled against those of another.
    generator = np.random.default_rng(1)
    losses = {name: tuning_loss(evidence, name) for name in ("ppo", *others)}
    value = losses["ppo"][0] - np.mean([losses[name][0] for name in others])
    resampled = generator.permutation(losses["ppo"][1:]) - np.mean(
        [generator.permutation(losses[name][1:]) for name in others], axis=0
    )
    low, high = np.percentile(resampled, [2.5, 97.5])
    text = f"loss of `ppo` ({losses['ppo'][0]:.3f}) − mean loss of {', '.join(f'`{name}`' for name in others)}"
    seeds = [len(evidence.runs[name]) for name in losses]  # the noise of every loss is taken from that many runs
    return positive(text, Estimate(float(value), float(low), float(high)), *seeds)


def fewer_lines(evidence: Evidence, simple: str, other: str) -> Claim:
    """One algorithm's file is shorter than another's."""
    paths = [evidence.algorithms / f"{name}.py" for name in (simple, other)]
    if not all(path.exists() for path in paths):
        return missing(*(path.name for path in paths if not path.exists()))
    short, long = map(lines_of_code, paths)
    verdict = Verdict.SUPPORTED if short < long else Verdict.CONTRADICTED
    text = f"`agents/algorithms/{simple}.py` has {short} lines of code, `agents/algorithms/{other}.py` {long}"
    return Claim(text, verdict)


def needs_fewer_tokens(evidence: Evidence, ours: str, theirs: str) -> Claim:
    """P(faster) − ½ is positive."""
    if lacking := evidence.lacks(ours, theirs):
        return missing(*lacking)
    chance = evidence.faster(ours, theirs)
    above = Estimate(chance.value - 0.5, chance.low - 0.5, chance.high - 0.5)
    claim = positive("", above, len(evidence.runs[ours]), len(evidence.runs[theirs]))
    numbers = f"{chance.value:.2f} {interval(chance, '.2f')}"
    return Claim(f"P(`{ours}` needs fewer tokens than `{theirs}`) = {numbers}", claim.verdict)


def spreads_more(evidence: Evidence, ours: str, theirs: str) -> Claim:
    """The final score varies more across seeds."""
    if lacking := evidence.lacks(ours, theirs):
        return missing(*lacking)
    estimate = spread_difference(evidence.scores(ours), evidence.scores(theirs))
    seeds = len(evidence.runs[ours]), len(evidence.runs[theirs])
    return positive(f"spread of `{ours}` − spread of `{theirs}`", estimate, *seeds)


def noisier_gradient(evidence: Evidence, ours: str, theirs: str, critic: str) -> Claim:
    """The gradient's signal-to-noise ratio is lower, on the same rollouts.

    :param evidence: with the gradients' noise.
    :param ours: an estimator without critic.
    :param theirs: one with a critic.
    :param critic: ``"cold"`` or ``"fitted"``, the two ends of what a critic knows in a training.
    """
    difference = evidence.noise.get(f"{theirs}-{critic}", {}).get("minus", {}).get(ours)
    if difference is None:
        return missing("gradient signal-to-noise")
    text = f"gradient signal-to-noise of `{theirs}` ({critic} critic) − of `{ours}`"
    return positive(text, Estimate(*difference))


def hardly_writes(evidence: Evidence, ours: str, theirs: str) -> Claim:
    """Supported if no seed (of enough) writes texts, contradicted if most do.

    Writing texts is to score at least half of what the other one gains, without collapsing: one word repeated can
    please a reward model, and is no text.
    """
    if lacking := evidence.lacks(ours, theirs):
        return missing(*lacking)
    start = untrained(evidence.runs)
    enough = start["score"] + (iqm(evidence.scores(theirs)) - start["score"]) / 2
    runs = evidence.runs[ours]
    high = sum(run["score"] >= enough for run in runs)
    writing = sum(run["score"] >= enough and not collapsed(run, start) for run in runs)
    if len(runs) < FEWEST_SEEDS or 0 < writing <= len(runs) / 2:
        verdict = Verdict.UNDECIDED
    else:
        verdict = Verdict.CONTRADICTED if writing else Verdict.SUPPORTED
    text = f"`{ours}` scores at least {enough:.2f}, half-way to `{theirs}`, in {high} of {len(runs)} seeds, and in "
    return Claim(text + f"{writing} of them with texts that have not collapsed", verdict)


def worst_seed(evidence: Evidence, *names: str) -> str:
    """A note."""
    worst = [f"`{name}` {min(evidence.scores(name)):.2f}" for name in names if name in evidence.runs]
    return f"Worst seed: {', '.join(worst) or 'not measured'}."


def judge(evidence: Evidence) -> list[Sentence]:
    """
    :param evidence: everything that was measured.
    :return: the sentences, each with its verdict.
    """

    def stable(name: str) -> list[Claim]:
        if evidence.lacks(name):
            return [missing(name)]
        return [never_collapses(name, evidence.runs[name]), spreads_little(name, evidence.runs[name])]

    def in_seconds(ours: str, *others: str) -> str:
        if evidence.lacks(ours):
            return "In wall time: not measured."
        chances = [
            f"{evidence.faster(ours, other, evidence.seconds_to_target).value:.2f} (`{other}`)"
            for other in others
            if other in evidence.runs
        ]
        return f"In wall time instead of tokens, P(`{ours}` is faster): {', '.join(chances) or 'not measured'}."

    reinforce = {"with a mean baseline": "reinforce", "without a baseline": "reinforce-no-baseline"}
    return [
        Sentence("PPO is stable", STABLE, stable("ppo"), [worst_seed(evidence, "ppo")]),
        Sentence(
            "PPO is efficient",
            f"In tokens, against A2C **and** REINFORCE: {FASTER}",
            [needs_fewer_tokens(evidence, "ppo", other) for other in ("a2c", "reinforce")],
            [in_seconds("ppo", "a2c", "reinforce", "rloo", "grpo")],
        ),
        Sentence(
            "PPO needs tuning",
            "Against the other own algorithms on the same learning rates: the objective (score − β·KL) of the learning "
            "rate chosen − the mean over all that were tried is larger for PPO than for the others on average. A trial "
            "is one run; its noise is resampled from the deviations of the final runs.",
            [needs_tuning(evidence)],
        ),
        Sentence(
            "A2C is simpler",
            "Its file has fewer lines of code than PPO's (no blank lines, comments or docstrings).",
            [fewer_lines(evidence, "a2c", "ppo")],
        ),
        Sentence(
            "A2C is less stable",
            "Its final score has a larger standard deviation across seeds than PPO's.",
            [spreads_more(evidence, "a2c", "ppo")],
            [claim.text + "." for claim in stable("a2c")[:1]] + [worst_seed(evidence, "a2c", "ppo")],
        ),
        Sentence(
            "A2C is less sample-efficient",
            f"PPO is faster: {FASTER}",
            [needs_fewer_tokens(evidence, "ppo", "a2c")],
            [in_seconds("ppo", "a2c")],
        ),
        Sentence(
            "REINFORCE is conceptually simple",
            "Its file, three baselines included, has fewer lines of code than PPO's.",
            [fewer_lines(evidence, "reinforce", "ppo")],
        ),
        *(
            Sentence(
                f"REINFORCE is high in variance ({how}), beside PPO with a {critic} critic",
                "Its gradient has a lower signal-to-noise ratio than PPO's at the same policy on the same episodes, "
                "where PPO's critic knows nothing yet (cold) or is fitted to past episodes, **and** its final score "
                "has a larger standard deviation across seeds.",
                [noisier_gradient(evidence, name, "ppo", critic), spreads_more(evidence, name, "ppo")],
            )
            for how, name in reinforce.items()
            for critic in ("cold", "fitted")
        ),
        *(
            Sentence(
                f"REINFORCE is unstable ({how})",
                "It is not stable, by the rule for PPO: either half of it failing is enough.",
                [opposite(claim) for claim in stable(name)],
                [worst_seed(evidence, name, "ppo")],
                max,
            )
            for how, name in reinforce.items()
        ),
        Sentence(
            "DDPG and TD3 suit continuous actions and are hard for discrete text",
            "The second half: through the continuous wrapper (an action is a point of the embedding space), no seed of "
            "either reaches half of what stock SB3 PPO gains over the untrained language model with texts that have "
            "not collapsed (contradicted if most seeds of one do).",
            [hardly_writes(evidence, name, "sb3-ppo") for name in ("sb3-ddpg", "sb3-td3")],
            ["The first half is not measured: writing a text is not a continuous task."],
        ),
    ]
