"""A real language model on two CPU cores: SmolLM2-135M-Instruct learns to write positive film reviews.

    make smollm2        # fetches the model and runs this

PPO with LoRA in bfloat16; the reward is the built-in reward model, which learned from simulated preferences, and the
gold score is the lexicon's, which is never trained on. Then ``textrlhf evaluate`` on held-out prompts, whose answer is
written to ``evaluation.json`` together with the training's ``seconds`` and this process's ``peak_rss_gb``.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

import tyro

from agents.cli import EvaluateConfig, evaluate_policy, print_evaluation, print_pairs
from agents.runs.config import EnvConfig, TrainConfig
from benchmarks.provenance import provenance
from benchmarks.whole_run import ADAPTER, keep, train_anew, verdict

# What the run has to show on held-out prompts.
MIN_GOLD_GAIN, MAX_KL, MAX_PERPLEXITY_RATIO, MAX_MINUTES, MAX_RSS_GB = 0.3, 20.0, 1.5, 40.0, 4.0


@dataclass
class Config:
    """Train SmolLM2 by PPO and LoRA, evaluate it, and say whether it did what it should."""

    model: Path = Path("runs/smollm2/base")
    """The model's directory, as benchmarks.peers.convert_smollm2 makes it."""
    run_dir: Path = Path("runs/smollm2/run")
    """An earlier run there is replaced."""
    out: Path = Path("benchmarks/results/smollm2")
    """Where evaluation.json, config.yaml and learning_curve.png go."""
    reward: str = "builtin"
    """What it is trained on."""
    total_timesteps: int = 50_000
    """Tokens to generate."""
    learning_rate: float = 7e-4
    kl_coef: float = 0.05
    episodes: int = 192
    """Texts to evaluate, of the model before and after."""
    seed: int = 0


def train_config(config: Config) -> TrainConfig:
    """
    :return: the whole run, as ``textrlhf train --config`` would read it.
    """
    env = EnvConfig(
        prompts="examples.film_reviews:training_prompts",
        reward=config.reward,
        gold="sentiment",
        max_prompt_tokens=64,
        max_new_tokens=40,
    )
    return TrainConfig(
        model=str(config.model),
        env=env,
        total_timesteps=config.total_timesteps,
        run_dir=config.run_dir,
        seed=config.seed,
        learning_rate=config.learning_rate,
        n_episodes=64,
        batch_size=16,
        n_epochs=1,
        kl_coef=config.kl_coef,
        sample_every=10,
        **ADAPTER,
    )


def main(config: Config) -> int:
    """
    :return: 0 if the run did what it should.
    """
    origin, settings = provenance("benchmarks.smollm2"), train_config(config)
    seconds = train_anew(settings)
    question = EvaluateConfig(
        policy=str(config.run_dir / "policy"),
        trust=True,  # the run above
        prompts="examples.film_reviews:held_out_prompts",
        episodes=config.episodes,
        texts=6,
        seed=config.seed,
        dtype=settings.dtype,
    )
    result = evaluate_policy(question)
    print_evaluation(result)
    print_pairs(result)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux
    result |= {"seconds": seconds, "peak_rss_gb": peak, "total_timesteps": config.total_timesteps}
    keep(result | origin, config.run_dir, config.out)
    before, after = result["reference"], result["policy"]
    gain = after["gold_score"] - before["gold_score"]
    ratio = after["perplexity"] / before["perplexity"]
    checks = {
        f"held-out lexicon score rose by {gain:.2f}, at least {MIN_GOLD_GAIN}": gain >= MIN_GOLD_GAIN,
        f"KL {result['kl']:.1f} nats per episode, under {MAX_KL:g}": result["kl"] < MAX_KL,
        f"perplexity {ratio:.2f} times the start's, at most {MAX_PERPLEXITY_RATIO}": ratio <= MAX_PERPLEXITY_RATIO,
        f"trained in {seconds / 60:.0f} minutes, at most {MAX_MINUTES:g}": seconds <= 60 * MAX_MINUTES,
        f"peak memory {peak:.1f} GB, under {MAX_RSS_GB:g}": peak < MAX_RSS_GB,
    }
    return verdict(checks)


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Config)))
