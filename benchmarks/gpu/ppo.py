"""One iteration of PPO: its parts, its update beside a bare forward and backward pass, and TRL's PPO beside it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agents.algorithms.ppo import PPO
from benchmarks import rollout, update
from benchmarks.gpu.models import classifier, subject
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Record, spread
from benchmarks.gpu.throughput import decodings
from benchmarks.models import PEERS, Subject
from benchmarks.peers.turns import Child
from benchmarks.timing import alternate, seconds_of, synchronize
from text_env.rewards import SequenceClassifierReward

ROOT = Path(__file__).parents[2]


class Clocks:
    """Seconds in functions, the device's work included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """
        :param name: of the clock.
        :param function: what it measures.
        :return: the function, which adds its seconds to the clock.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return run


class TimedReward:
    """A reward model with a clock.

    :param reward: the reward model.
    :param clocks: one of which is ``"reward"``.
    """

    name = "timed"

    def __init__(self, reward: SequenceClassifierReward, clocks: Clocks) -> None:
        self._score = clocks.timed("reward", reward)

    def __call__(self, **batch: Any) -> Any:
        return self._score(**batch)


class Iteration:
    """One iteration of our PPO, with clocks in it. A call runs one and says how many tokens it wrote.

    :param what: model and sizes.
    :param shape: of the reward model.
    :param separate_critic: whether the critic has a decoder of its own, as TRL's has.
    """

    def __init__(self, what: Subject, shape: str, separate_critic: bool) -> None:
        model = what.own_copy().model
        self.tokens = what.episodes * what.response
        self.clocks = clocks = Clocks()
        positions = what.prompt_tokens + what.response
        scorer = classifier(shape, positions + 2, model.device, model.dtype)
        reward = TimedReward(SequenceClassifierReward(scorer, what.tokenizer, batch_size=64), clocks)
        self.algorithm = PPO(
            "CausalLMPolicy",
            rollout.make_env(what, reward),
            learning_rate=1e-5,
            n_episodes=what.episodes,
            batch_size=update.minibatch(what.episodes),
            n_epochs=update.EPOCHS,
            kl_coef=0.05,
            seed=0,
            device=model.device,
            policy_kwargs={"model": model, "separate_critic": separate_critic, "decode": decodings()[-1]},
        )
        algorithm: Any = self.algorithm
        algorithm.collect_rollouts = clocks.timed("collect", algorithm.collect_rollouts)
        algorithm.update = clocks.timed("update", algorithm.update)
        algorithm.reference.scores = clocks.timed("reference", algorithm.reference.scores)
        self.parts: list[dict[str, float]] = []
        self._first = True

    def __call__(self) -> int:
        self.clocks.seconds.clear()
        self.algorithm.learn(self.tokens, reset_num_timesteps=self._first, log_interval=0)
        self._first = False
        found = {"reward": 0.0, "reference": 0.0, **self.clocks.seconds}
        # The reward is paid, and the reference asked, inside of it.
        found["rollout"] = found.pop("collect") - found["reward"] - found["reference"]
        self.parts.append(found)
        return self.tokens


def trl_python() -> str | None:
    """
    :return: the Python that can run TRL's PPO: this one, or that of ``make peers``; None if there is none.
    """
    have = {name for name in ("trl", "datasets", "accelerate") if importlib.util.find_spec(name) is not None}
    if len(have) == 3 and importlib.metadata.version("trl").startswith("1.12."):
        return sys.executable
    peers = PEERS / "bin" / "python"
    return str(peers) if peers.exists() else None


def trl(what: Subject, shape: str, device: torch.device) -> Child:
    """
    :param what: sizes.
    :param shape: of its models.
    :param device: where it runs.
    :return: TRL's PPO, one iteration a turn.
    :raises FileNotFoundError: if TRL 1.12, the last release with PPO, isn't installed.
    """
    python = trl_python()
    if python is None:
        raise FileNotFoundError("TRL 1.12 with datasets and accelerate is not installed (`make peers`)")
    settings = {
        "episodes": what.episodes,
        "minibatches": update.MINIBATCHES,
        "epochs": update.EPOCHS,
        "response": what.response,
        "threads": torch.get_num_threads(),
        "shape": shape,
        "prompt": what.prompt_tokens,
        "device": device.type,
    }
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return Child([python, "-m", "benchmarks.peers.trl_ppo", *options], ROOT)


def iterations(what: Subject, shape: str, separate_critic: bool, repeats: int, record: Record) -> Iteration:
    """Our iteration by itself.

    :param what: model and sizes.
    :param shape: of the reward model.
    :param separate_critic: whether the critic has a decoder of its own.
    :param repeats: timed iterations.
    :param record: where the figures go.
    :return: the algorithm, after these.
    """
    cuda = what.model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run = Iteration(what, shape, separate_critic)
    run()
    run.parts.clear()
    total: list[float] = []
    while len(total) < repeats and (not total or record.seconds_left > 2 * total[-1]):
        total.append(seconds_of(run)[0])
        logged = run.algorithm.logger.name_to_value
        figure = {
            "model": shape,
            "episodes": what.episodes,
            "prompt": what.prompt_tokens,
            "response": what.response,
            "seconds": spread(total),
            "tokens_per_second": spread([run.tokens / seconds for seconds in total]),
            "parts": {name: spread([part[name] for part in run.parts]) for name in run.parts[0]},
            "first_ratio_max": float(logged.get("train/ratio_first_max", float("nan"))),
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        }
        record.add(f"ours, {'separate critic' if separate_critic else 'value head'}", figure)
    return run


def measure(options: Options, record: Record, which: int = 0) -> None:
    """
    :param options: resolved; the first model and number of rows are used.
    :param record: where the figures go.
    :param which: there is but one stage.
    """
    assert options.models is not None
    assert options.rows is not None
    assert options.prompt is not None
    assert options.response is not None
    device, shape = torch.device(options.device or "cpu"), options.models[0]
    what = subject(shape, options.rows[0], options.prompt, options.response, device)
    repeats = min(options.repeats, 2)
    start = time.monotonic()
    with record.attempt("ours, value head", needs=10) as enough:
        if enough:
            run = iterations(what, shape, False, repeats, record)
            with record.attempt("update ÷ bare passes", needs=5) as enough_for_both:
                if enough_for_both:
                    sides = {
                        "ours": update.update(run.algorithm),
                        "bare": update.bare_passes(run.algorithm, what),
                    }
                    speeds = alternate(sides, repeats)
                    ratios = [bare / own for own, bare in zip(speeds["ours"], speeds["bare"], strict=True)]
                    record.add("update ÷ bare passes", {"time": spread(ratios)})
            del run
    # Which takes about twice as long.
    with record.attempt("ours, separate critic", needs=max(10.0, 1.5 * (time.monotonic() - start))) as enough:
        if enough:
            compared = iterations(what, shape, True, repeats, record)
            with record.attempt("TRL", needs=20) as enough_for_trl:
                if enough_for_trl:
                    record.add("TRL", beside_trl(compared, trl(what, shape, device), repeats))


def beside_trl(run: Iteration, child: Child, repeats: int) -> dict[str, Any]:
    """
    :param run: our iteration.
    :param child: TRL's.
    :param repeats: timed rounds.
    """
    sides: dict[str, Callable[[], float]] = {"ours": lambda: seconds_of(run)[0], "TRL": lambda: child.turn()["seconds"]}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    child.turn()  # warm-up
    for number in range(repeats):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            seconds[name].append(sides[name]())
    child.stop()
    ratios = [their / our for our, their in zip(seconds["ours"], seconds["TRL"], strict=True)]
    return {"seconds": spread(seconds["TRL"]), "ours_seconds": spread(seconds["ours"]), "TRL ÷ ours": spread(ratios)}
