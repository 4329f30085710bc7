"""The report of the algorithm benchmark: ``table.md`` and four plots, from the results in a directory.

python -m benchmarks.algorithms.report benchmarks/results/algorithms
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.algorithms.plots import in_families, write_plots
from benchmarks.algorithms.sentences import (
    BOOTSTRAP_REPETITIONS,
    FEWEST_SEEDS,
    SMOOTHING,
    Estimate,
    Evidence,
    Run,
    bootstrap,
    chosen_trial,
    collapsed,
    collapses,
    diverged,
    has_likelihood,
    iqm,
    iqm_difference,
    judge,
    objectives,
    probability_of_improvement,
    spread,
    tuning_loss,
    untrained,
)

NEEDED = ("algorithm", "seed", "learning_rate", "score", "gold_score", "kl", "perplexity", "distinct_2", "tokens",
          "seconds", "cpu_seconds", "curve", "start", "episodes")  # fmt: skip
CRITIC_FREE = ("reinforce", "reinforce-no-baseline", "rloo", "grpo", "trl-rloo", "trl-grpo", "trl-reinforce")


def write_report(directory: Path) -> None:
    """Write ``table.md`` and the plots beside the results.

    :param directory: holds ``results.json``, ``environment.json``, and, where they were measured, ``tuning.json``,
        ``gradient_noise.json`` and ``wall_time.json``.
    :raises ValueError: if a run lacks a field, has no finite score, or stands there twice.
    """
    environment = json.loads((directory / "environment.json").read_text())
    noise = read(directory / "gradient_noise.json")
    wall_time = read(directory / "wall_time.json")
    evidence = Evidence(
        runs=by_algorithm(json.loads((directory / "results.json").read_text())),
        tuning=read(directory / "tuning.json"),
        noise=noise.get("estimators", {}),
        kl_coef=environment["kl_coef"],
    )
    sections = [
        introduction(evidence, environment),
        goals(evidence, wall_time),
        learned(evidence),
        reliability(evidence),
        without_likelihood(evidence),
        critic_free(evidence),
        sentences(evidence),
        gradients(noise),
        tuning(evidence),
        details(environment),
    ]
    (directory / "table.md").write_text("\n\n".join(section for section in sections if section) + "\n")
    write_plots(evidence.runs, directory)


def read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file isn't there."""
    return json.loads(path.read_text()) if path.exists() else {}


def by_algorithm(results: Sequence[Run]) -> dict[str, list[Run]]:
    """
    :param results: in any order.
    :return: algorithm → its runs by seed, families of algorithms together.
    :raises ValueError: see ``write_report``.
    """
    if not results:
        raise ValueError("results.json has no runs: run python -m benchmarks.algorithms first.")
    runs: dict[str, list[Run]] = {}
    for number, run in enumerate(results):
        which = f"results.json, run {number} ({run.get('algorithm')}, seed {run.get('seed')})"
        if lacking := [name for name in NEEDED if name not in run]:
            raise ValueError(f"{which} has no {', '.join(lacking)}: run it again, or remove it.")
        if not isinstance(run["score"], float | int) or not math.isfinite(run["score"]):
            raise ValueError(f"{which}: expected a finite score, got {run['score']}: look at that run.")
        if not run["curve"]:
            raise ValueError(f"{which} has an empty curve: expected the score of at least one bin of tokens.")
        same = runs.setdefault(run["algorithm"], [])
        if any(run["seed"] == other["seed"] for other in same):
            raise ValueError(f"{which} stands there twice: remove one.")
        same.append(run)
    for same in runs.values():
        same.sort(key=lambda run: run["seed"])
    return {name: runs[name] for names in in_families(runs).values() for name in names}


# ---------------------------------------------------------------------------------------------------------- formatting


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column left, the others right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_interval(estimate: Estimate | None, style: str = ".2f") -> str:
    """``1.23 [1.10, 1.35]``; n/a without an estimate, no interval from a single run."""
    if estimate is None:
        return "n/a"
    text = f"{estimate.value:{style}}"
    return f"{text} [{estimate.low:{style}}, {estimate.high:{style}}]" if math.isfinite(estimate.low) else text


def cell(numbers: Sequence[float] | None, style: str = ".4f") -> str:
    """Of an estimate with its bounds as three numbers."""
    return with_interval(Estimate(*numbers) if numbers else None, style)


def iqm_of(runs: Sequence[Run], key: str, style: str = ".2f") -> str:
    """IQM and interval of one field; n/a where a run has none."""
    values = [run[key] for run in runs]
    return "n/a" if any(value is None for value in values) else with_interval(bootstrap(iqm, values), style)


def tokens_to_target(evidence: Evidence, name: str) -> str:
    """IQM in thousands. Runs that never arrive count with all of their tokens, which makes it a lower bound."""
    needed = evidence.tokens_to_target(name)
    arrived = sum(map(math.isfinite, needed))
    count = f"({arrived}/{len(needed)})"
    if not arrived:
        return f"not reached {count}"
    at_least = [min(t, run["tokens"]) / 1000 for t, run in zip(needed, evidence.runs[name], strict=True)]
    return f"{'' if arrived == len(needed) else '≥ '}{with_interval(bootstrap(iqm, at_least), '.0f')} {count}"


def quartile_range(values: Sequence[float]) -> float:
    """From the first quartile to the third."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low)


def yes(answer: bool) -> str:
    """Of a goal."""
    return "**met**" if answer else "**not met**"


# ------------------------------------------------------------------------------------------------------------ sections


def introduction(evidence: Evidence, environment: dict[str, Any]) -> str:
    """What was run, and how to read the rest."""
    runs = evidence.runs
    seeds = "; ".join(f"`{name}` {len(runs[name])}" for name in runs)
    episodes = next(iter(runs.values()))[0]["episodes"]
    budget = environment["total_timesteps"]
    return f"""# Algorithms on the same text task

Written by `python -m benchmarks.algorithms.report` from `results.json`, `tuning.json`, `gradient_noise.json` and
`environment.json` beside this file; no figure or verdict is typed by hand.

## What was run

```
{environment["command"]}
```

It took {duration(environment["duration"])} on {environment["machine"].get("cpu", "an unknown CPU")}, two runs at a
time. Every run starts from the same language model and trains on the same prompts with the same reward model, for
{budget:,} tokens (a timestep is a token), with the same optimiser, the same KL coefficient (β = {evidence.kl_coef:g})
where the algorithm's policy has a likelihood, and a learning rate chosen by {trials_of(evidence)}. Only the
algorithm differs. `sb3-` are Stable-Baselines3's own algorithms, unmodified; `trl-` are TRL's; the others are this
project's. Seeds: {seeds}.

## How to read it

- **Numbers** are interquartile means over the seeds (the mean of the middle half) with 95 % stratified bootstrap
  intervals ({BOOTSTRAP_REPETITIONS:,} resamples, `rliable`). An interval from five seeds is itself uncertain, and
  tends to be short.
- **score**: the reward model's, which is trained on. **gold score**: a sentiment lexicon's, which no algorithm sees.
  Both on {episodes} texts for held-out prompts after training, like everything else about texts.
- **KL**: of the policy to the untrained model, nats per episode. **objective**: score − β·KL, what is maximised.
- **perplexity**: of the texts under the untrained model. **distinct-2**: share of distinct word pairs among all word
  pairs of the texts; low means that they are all alike.
- **thousand tokens to target**: training tokens until the run's learning curve (moving average of {SMOOTHING} bins)
  reaches {evidence.target:.2f}: 80 % of the way from the untrained model to the end of the best algorithm's curve.
  In brackets how many runs arrive; "≥" counts those that don't with their whole budget.
- **std**, **IQR**: of the final score across seeds. **worst seed**: the lowest final score.
- **collapses**: runs that end under the score they started from, or with distinct-2 under a quarter of the start's.
- **seconds**: wall time of training, two runs at a time, which anything else on the machine lengthens. **CPU seconds**:
  of its one thread.
- **gradient SNR**: signal-to-noise ratio of the estimator's gradient, of all estimators at the same starting policy
  on the same episodes; n/a where the algorithm is not ours or it was not measured.

![score over tokens](learning_curves.png)

![score against KL](score_kl.png)"""


def trials_of(evidence: Evidence) -> str:
    """How many, for whom."""
    counts = {name: len(evidence.tuning.get(name, [])) for name in evidence.runs}
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values()))} tuning trials each"
    return "tuning trials (" + ", ".join(f"`{name}` {count}" for name, count in counts.items()) + ")"


def duration(seconds: float) -> str:
    """In words."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def learned(evidence: Evidence) -> str:
    """What comes out at the end."""
    names = [name for name in evidence.runs if has_likelihood(evidence.runs[name])]
    if not names:
        return ""
    start = untrained(evidence.runs)
    rows = [
        ["untrained", "", f"{start['score']:.2f}", f"{start['gold_score']:.2f}", "0", f"{start['score']:.2f}",
         f"{start['perplexity']:.1f}", f"{start['distinct_2']:.2f}"]
    ]  # fmt: skip
    for name in names:
        runs = evidence.runs[name]
        rows.append([
            f"`{name}`",
            str(len(runs)),
            iqm_of(runs, "score"),
            iqm_of(runs, "gold_score"),
            iqm_of(runs, "kl", ".1f"),
            with_interval(bootstrap(iqm, objectives(runs, evidence.kl_coef))),
            iqm_of(runs, "perplexity", ".1f"),
            iqm_of(runs, "distinct_2"),
        ])  # fmt: skip
    header = ["algorithm", "seeds", "score", "gold score", "KL", "objective", "perplexity", "distinct-2"]
    return f"## What is learned\n\n{markdown_table(header, rows)}"


def reliability(evidence: Evidence) -> str:
    """How fast, how reliably, at what cost."""
    names = [name for name in evidence.runs if has_likelihood(evidence.runs[name])]
    header = ["algorithm", "thousand tokens to target", "std", "IQR", "worst seed", "collapses", "seconds",
              "CPU seconds", "gradient SNR"]  # fmt: skip
    table = markdown_table(header, [cost(evidence, name) for name in names])
    return f"## How fast, how reliably, at what cost\n\n{table}\n\n![seeds](seeds.png)\n\n" + (
        "![probability of improvement](probability_of_improvement.png)"
    )


def cost(evidence: Evidence, name: str) -> list[str]:
    """A row of ``reliability``."""
    runs, scores = evidence.runs[name], evidence.scores(name)
    return [
        f"`{name}`",
        tokens_to_target(evidence, name),
        f"{spread(scores):.3f}" if len(scores) > 1 else "n/a",
        f"{quartile_range(scores):.3f}" if len(scores) > 1 else "n/a",
        f"{min(scores):.2f}",
        f"{collapses(evidence.runs, name)}/{len(runs)}",
        iqm_of(runs, "seconds", ".0f"),
        iqm_of(runs, "cpu_seconds", ".0f"),
        with_interval(evidence.snr(name), ".4f"),
    ]


def without_likelihood(evidence: Evidence) -> str:
    """DDPG and TD3."""
    names = [name for name in evidence.runs if not has_likelihood(evidence.runs[name])]
    if not names:
        return ""
    rows = []
    for name in names:
        runs = evidence.runs[name]
        start = float(np.mean([run["start"]["score"] for run in runs]))
        rows.append([
            f"`{name}`",
            str(len(runs)),
            f"{start:.2f}",
            iqm_of(runs, "score"),
            iqm_of(runs, "gold_score"),
            "n/a",
            iqm_of(runs, "perplexity", ".1f"),
            iqm_of(runs, "distinct_2"),
            *cost(evidence, name)[1:-1],
        ])  # fmt: skip
    header = ["algorithm", "seeds", "untrained score", "score", "gold score", "KL", "perplexity", "distinct-2",
              "thousand tokens to target", "std", "IQR", "worst seed", "collapses",
              "seconds", "CPU seconds"]  # fmt: skip
    return f"""## Algorithms without a likelihood

They act in the continuous wrapper, whose action is a point in the embedding space, decoded to the nearest token.
Their policies are deterministic functions with added noise: no token has a probability, so there is no KL to report
and none to penalise. "Untrained" is their own untrained actor; collapses are counted against the untrained language
model. A high score beside a distinct-2 of 0 is one word repeated, which the reward model takes for enthusiasm.

{markdown_table(header, rows)}"""


@dataclass(frozen=True)
class Frontier:
    """Two algorithms at the same KL."""

    kl: float
    ours: float
    theirs: Estimate


def frontier(ours: Sequence[Run], theirs: Sequence[Run]) -> Frontier:
    """Scores at the lower of the two KLs (IQM).

    A frontier is concave: below its own KL an algorithm scores at least what lies on the chord from the start, and
    about start + gain·√(KL ratio) by the law of Gao et al. 2022 (https://arxiv.org/abs/2210.10760). Ours is brought
    down by the chord and theirs by the law: each time what favours them.
    """
    kls = [iqm([run["kl"] for run in runs]) for runs in (ours, theirs)]
    kl = min(kls)

    def brought_down(runs: Sequence[Run], share: float) -> list[float]:
        return [run["start"]["score"] + share * (run["score"] - run["start"]["score"]) for run in runs]

    ours_share, theirs_share = (kl / k if k > 0 else 1.0 for k in kls)
    return Frontier(
        kl,
        iqm(brought_down(ours, ours_share)),
        bootstrap(iqm, brought_down(theirs, math.sqrt(max(theirs_share, 0.0)))),
    )


def goals(evidence: Evidence, wall_time: dict[str, Any]) -> str:
    """PPO against TRL's."""
    runs = evidence.runs
    title = "## The goals: our PPO against TRL's\n\n"
    if lacking := evidence.lacks("ppo", "trl-ppo"):
        return title + f"Not measured: no runs of {', '.join(f'`{name}`' for name in lacking)}."
    ours, theirs = runs["ppo"], runs["trl-ppo"]
    variants = [name for name in ("ppo", "ppo-two-thirds", "ppo-value-head") if name in runs]
    # Wall time of two processes at a time depends on what else the machine was doing; CPU time hardly does.
    cpu = {name: [run["cpu_seconds"] for run in runs[name]] for name in (*variants, "trl-ppo")}
    ratios = {name: bootstrap(lambda a, b: iqm(a) / iqm(b), cpu[name], cpu["trl-ppo"]) for name in variants}
    count = sum(map(collapsed, ours))
    trials = [len(evidence.tuning.get(name, [])) for name in ("ppo", "trl-ppo")]
    tokens = [iqm([run["tokens"] for run in side]) for side in (ours, theirs)]
    rows = [
        *(row for name in variants for row in on_frontier(evidence, name)),
        *(
            [
                f"`{name}`: at most half of the time; CPU seconds of a run on one thread: ratio {with_interval(ratio)}",
                f"{iqm(cpu[name]):.0f} s",
                f"{iqm(cpu['trl-ppo']):.0f} s",
                yes(ratio.value <= 0.5),
            ]
            for name, ratio in ratios.items()
        ),
        *on_all_cores(wall_time),
        [
            "no collapse in ten seeds",
            f"{count} of {len(ours)}",
            f"{sum(map(collapsed, theirs))} of {len(theirs)}",
            yes(count == 0 and len(ours) >= 10),
        ],
        ["as many tuning trials for TRL", str(trials[0]), str(trials[1]), yes(trials[0] == trials[1] > 0)],
        [
            "equal tokens (within 5 %)",
            f"{tokens[0]:,.0f}",
            f"{tokens[1]:,.0f}",
            yes(abs(tokens[0] / tokens[1] - 1) <= 0.05),
        ],
    ]
    note = (
        "The critic of `ppo` is a model of its own that starts as the reward model, as TRL's is; that of "
        "`ppo-value-head` is a head on the policy. `ppo-two-thirds` is `ppo` with two thirds of the tokens. Score at "
        "equal KL: both are brought to the lower of the two KLs. Ours by the straight line to the untrained model, a "
        "lower bound of a concave frontier; TRL's by gain ∝ √KL (Gao et al. 2022), the more generous to it."
    )
    return title + markdown_table(["goal", "ours", "TRL", ""], rows) + "\n\n" + note


def on_frontier(evidence: Evidence, name: str) -> list[list[str]]:
    """The goals' rows for an algorithm's score at equal KL and for its objective, beside TRL PPO's."""
    ours, theirs = evidence.runs[name], evidence.runs["trl-ppo"]
    at_kl = frontier(ours, theirs)
    objective = [objectives(side, evidence.kl_coef) for side in (ours, theirs)]
    their_objective = bootstrap(iqm, objective[1])
    return [
        [
            f"`{name}`: score at equal KL ({at_kl.kl:.1f} nats) at or above TRL PPO's 95 % interval",
            f"{at_kl.ours:.2f}",
            with_interval(at_kl.theirs),
            at_or_above(at_kl.ours, at_kl.theirs),
        ],
        [
            f"`{name}`: objective score − {evidence.kl_coef:g}·KL likewise",
            f"{iqm(objective[0]):.2f}",
            with_interval(their_objective),
            at_or_above(iqm(objective[0]), their_objective),
        ],
    ]


def on_all_cores(wall_time: dict[str, Any]) -> list[list[str]]:
    """The goal's row for single runs on the whole machine, timed in turns, if that was measured."""
    if not wall_time:
        return []
    ratio = wall_time["ratio"]
    medians = [float(np.median(wall_time["seconds_per_token"][side])) * 1000 for side in ("ppo", "trl-ppo")]
    what = f"… wall time, one run at a time on {wall_time['threads']} threads, in turns: ratio {ratio['value']:.2f} "
    what += f"(quartiles {ratio['low']:.2f} to {ratio['high']:.2f})"
    return [[what, *(f"{m:.2f} s per 1,000 tokens" for m in medians), yes(ratio["value"] <= 0.5)]]


def at_or_above(value: float, interval: Estimate) -> str:
    """Whether a value isn't below an interval, and where it lies."""
    if not math.isfinite(interval.low):
        return "undecided (no interval from one seed)"
    if value > interval.high:
        return f"{yes(True)} (above the interval)"
    return f"{yes(True)} (in the interval)" if value >= interval.low else f"{yes(False)} (below the interval)"


def critic_free(evidence: Evidence) -> str:
    """Where a method without a critic wins over PPO."""
    names = [name for name in CRITIC_FREE if name in evidence.runs]
    if "ppo" not in evidence.runs or not names:
        return ""
    rows, wins = [], []
    ppo = evidence.runs["ppo"]
    for name in names:
        runs = evidence.runs[name]
        differences = {
            "score": iqm_difference(evidence.scores(name), evidence.scores("ppo")),
            "objective": iqm_difference(objectives(runs, evidence.kl_coef), objectives(ppo, evidence.kl_coef)),
        }
        chances = {
            "tokens to target": evidence.faster(name, "ppo"),
            "wall time to target": evidence.faster(name, "ppo", evidence.seconds_to_target),
        }
        won = [what for what, d in differences.items() if d.low > 0] + [w for w, c in chances.items() if c.low > 0.5]
        lost = [what for what, d in differences.items() if d.high < 0] + [w for w, c in chances.items() if c.high < 0.5]
        if len(runs) < FEWEST_SEEDS or len(ppo) < FEWEST_SEEDS:
            won, lost = [], []
        wins += [f"`{name}` ({', '.join(won)})"] if won else []
        rows.append([
            f"`{name}`",
            *(with_interval(d, "+.2f") for d in differences.values()),
            with_interval(probability_of_improvement(evidence.scores(name), evidence.scores("ppo"))),
            *(with_interval(c) for c in chances.values()),
            ", ".join(won) or "–",
            ", ".join(lost) or "–",
        ])  # fmt: skip
    header = ["algorithm", "score − PPO's", "objective − PPO's", "P(higher score)", "P(fewer tokens to target)",
              "P(less wall time to target)", "wins", "loses"]  # fmt: skip
    said = f"**They win over PPO here:** {'; '.join(wins)}." if wins else "**None wins over PPO beyond its interval.**"
    return f"""## Where a critic-free method wins

Methods without a value function against our PPO; a win or a loss is a 95 % interval that excludes 0 (differences) or
one half (probabilities), with at least {FEWEST_SEEDS} seeds on both sides. No correction is made for looking many
times.

{said}

{markdown_table(header, rows)}"""


def sentences(evidence: Evidence) -> str:
    """The sentences that everybody repeats."""
    judged = judge(evidence)
    overview = [[s.text, f"**{s.verdict}**", "<br>".join(claim.text for claim in s.claims)] for s in judged]
    parts = []
    for s in judged:
        lines = [f"**{s.text}:** {s.verdict}.", "", f"- How it is read: {s.rule}"]
        lines += [f"- {claim.text}: {claim.verdict}." for claim in s.claims] + [f"- {note}" for note in s.notes]
        parts.append("\n".join(lines))
    # Only the first column of these tables is text elsewhere; here all of them are.
    table = markdown_table(["sentence", "verdict", "evidence"], overview).replace("---:", "---")
    return f"""## The sentences that everybody repeats

A claim is a quantity that is positive if it holds. It is **supported** if the quantity's 95 % interval lies above 0,
**contradicted** if it lies below, and otherwise **undecided at this budget**, as it is with fewer than {FEWEST_SEEDS}
seeds on either side. A sentence of several claims is supported if all are and contradicted if one is (where one is
enough, the other way round). "This budget" is this task, this small model and these tokens: nothing here is said of
others.

{table}

### How each was judged

{(chr(10) * 2).join(parts)}"""


def gradients(noise: dict[str, Any]) -> str:
    """Signal-to-noise of every estimator that was measured."""
    if not noise:
        return ""
    rows = [
        [
            f"`{name}`",
            *(
                cell(None if found["snr"] is None else [found[key] for key in ("snr", "low", "high")]),
                cell(found["cosine"], ".2f"),
            ),
        ]
        for name, found in noise["estimators"].items()
    ]
    header = ["estimator", "signal-to-noise", "cosine with plain REINFORCE"]
    return f"""## Gradient signal-to-noise

Of each estimator's gradient at the untrained policy, on the same {noise["rollouts"]} rollouts of
{noise["episodes_per_rollout"]} episodes: ‖E g‖² / tr Cov(g) of one rollout; intervals are the jackknife's. A critic
is either cold (knows nothing yet) or fitted to past episodes; the rest of this report takes the fitted one. A cosine
of 1 is an estimator without bias.

{markdown_table(header, rows)}"""


def tuning(evidence: Evidence) -> str:
    """Every trial, in the order of learning rates."""
    if not evidence.tuning:
        return ""
    rows = []
    for name, trials in evidence.tuning.items():
        runs = evidence.runs.get(name)
        chosen = chosen_trial(name, trials, runs) if runs else None
        cells = [
            ("**{}**" if i == chosen else "{}").format(
                f"{t['learning_rate']:.1e}: " + ("diverged" if diverged(t) else f"{t['objective']:.2f}")
            )
            for i, t in sorted(enumerate(trials), key=lambda item: item[1]["learning_rate"])
        ]
        whole = runs and not any(map(diverged, trials))
        lost = f"{tuning_loss(evidence, name)[0]:.2f}" if whole else "n/a"
        rows.append([f"`{name}`", str(len(trials)), ", ".join(cells), lost])
    return f"""## Tuning

The learning rate alone is tuned, one run a trial. Each trial with its objective (score − β·KL); bold: chosen. The
loss is the chosen trial's objective − the mean of all: what someone who doesn't tune would lose.

{markdown_table(["algorithm", "trials", "learning rate: objective", "loss untuned"], rows)}"""


def details(environment: dict[str, Any]) -> str:
    """Machine, versions, date."""
    rows = [["date", str(environment["date"])]]
    rows += [[key, str(value)] for key, value in {**environment["machine"], **environment["versions"]}.items()]
    return "## Machine and versions\n\n" + markdown_table(["", ""], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    write_report(parser.parse_args().directory)


if __name__ == "__main__":
    main()
