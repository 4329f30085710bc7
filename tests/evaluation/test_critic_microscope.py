"""The microscope sees what a critic was made to be: perfect, the wrong way round, or blind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import PROMPTS, make_env, make_model, make_policy, plain_log_probs, plain_value
from rich.console import Console

from agents.evaluation.critic_microscope import CriticTarget, State, _branch, _positions, examine_critic, siblings
from agents.evaluation.critic_report import _explained, critic_table, plot_critic
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy
from text_env.vector_env import TextVectorEnv

LENGTH = 6
PROMPT: Any = None


def first_is_even(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Decided by the first token, so that every state after it has a value that is certain."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def env_of(**kwargs: Any) -> TextVectorEnv:
    return make_env(64, **{"reward": first_is_even, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH, **kwargs})


def with_values(policy: CausalLMPolicy, values: Callable[[float], float]) -> CausalLMPolicy:
    """A critic of known values: a function of the true one, which is ½ before the first token."""

    def last_values(contexts: Any, hidden: Any) -> torch.Tensor:
        first = contexts.input_ids[np.arange(len(contexts.length)), np.maximum(contexts.length - contexts.step, 0)]
        true = np.where(contexts.step > 0, first % 2 == 0, 0.5)
        return torch.tensor([[values(value)] for value in true])

    policy._last_values = last_values  # type: ignore[method-assign]
    return policy


def examined(values: Callable[[float], float], **kwargs: Any) -> dict[str, Any]:
    env = env_of()
    policy = with_values(make_policy(env, min_new_tokens=LENGTH), values)
    sizes = {"n_texts": 24, "n_positions": 3, "n_branches": 4, **kwargs}
    return examine_critic(policy, env, CriticTarget(), **sizes)


@pytest.mark.parametrize(
    ("critic", "explained", "tau", "ordered"),
    [
        (lambda true: true, 1.0, 1.0, 1.0),
        (lambda true: 1 - true, -3.0, -1.0, 0.0),  # its error varies by twice as much, squared, as the truth
        (lambda true: 0.3, 0.0, None, 0.5),
    ],
    ids=["perfect", "wrong way round", "blind"],
)
def test_a_critic_of_known_values_gets_the_figures_that_it_deserves(
    critic: Callable[[float], float], explained: float, tau: float | None, ordered: float
) -> None:
    result = examined(critic)
    start, *later = result["by_position"]
    assert [row["position"] for row in result["by_position"]] == pytest.approx([0, 1 / 3, 2 / 3])
    for row in later:  # where branches are certain
        assert row["explained_variance"] == pytest.approx(explained, abs=1e-6)
        assert row["kendall_tau"] == (None if tau is None else pytest.approx(tau))
        assert row["branch_rmse"] == 0
    assert start["branch_rmse"] > 0.3  # there the first token is open
    pairs = result["siblings"]
    assert 0 < pairs["decided"] < pairs["pairs"]
    assert (pairs["critic"], pairs["one_branch"], pairs["all_branches"]) == (ordered, 1.0, 1.0)
    low, high = pairs["critic_interval"]
    assert low - 1e-9 <= ordered <= high + 1e-9


def test_an_offset_is_a_bias_and_takes_no_order_away() -> None:
    plain, shifted = examined(lambda true: true), examined(lambda true: true + 2)
    assert shifted["overall"]["bias"] == pytest.approx(plain["overall"]["bias"] + 2)
    assert shifted["overall"]["rmse"] == pytest.approx(2, abs=0.3)
    assert shifted["siblings"] == plain["siblings"]
    low, high = shifted["overall"]["bias_interval"]
    assert low < 2.2
    assert high > 1.8


def test_where_no_siblings_differ_nothing_is_said_of_their_order(tmp_path: Path) -> None:
    env = env_of(reward=lambda prompts, completions, **_: [1.0] * len(completions))
    result = examine_critic(make_policy(env, min_new_tokens=LENGTH), env, CriticTarget(), 4, 2, 2)
    assert result["siblings"] == {"pairs": 4, "decided": 0}
    assert result["overall"]["explained_variance"] is None
    plot_critic(result, tmp_path / "critic.png")
    console = Console(width=120)
    with console.capture() as captured:
        console.print(critic_table(result))
    assert "None of 4 pairs of siblings differ" in captured.get()


def test_the_result_is_json_a_table_and_a_picture(tmp_path: Path) -> None:
    result = examined(lambda true: 0.8 * true)
    assert json.loads(json.dumps(result)) == result
    plot_critic(result, tmp_path / "critic.png", "runs/mine")
    assert (tmp_path / "critic.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=120)
    with console.capture() as captured:
        console.print(critic_table(result))
    shown = captured.get()
    assert f"{result['siblings']['decided']} pairs of {result['siblings']['pairs']} that differ: critic 100%" in shown
    assert f"{result['overall']['bias']:+.2f}" in shown
    assert len(result["states"]["value"]) == result["overall"]["states"] == 24 * 3


def test_a_share_far_below_zero_is_an_arrow_that_says_its_number() -> None:
    import matplotlib.figure

    axes = matplotlib.figure.Figure().subplots()
    shares = [(0.0, -4.17, 0.1), (0.5, None, None), (0.8, 0.2, 0.3)]
    names = ("position", "explained_variance", "kendall_tau")
    _explained(axes, {"by_position": [dict(zip(names, row, strict=True)) for row in shares]})
    assert [text.get_text() for text in axes.texts] == ["−4.2"]
    assert axes.get_ylim()[0] > -1.2


# ---- states and branches -------------------------------------------------------------------------------------------


def test_positions_begin_at_the_prompt_and_are_equally_far_apart() -> None:
    assert _positions(12, 4) == [0, 3, 6, 9]
    assert _positions(42, 6) == [0, 7, 14, 21, 28, 35]
    assert _positions(3, 6) == [0, 1, 2]
    assert _positions(1, 6) == [0]


def test_a_sibling_shares_the_prefix_and_differs_in_the_segment_after_it() -> None:
    along = [State(0, 0, PROMPT, []), State(0, 1, PROMPT, [5, 6]), State(0, 2, PROMPT, [5, 6, 7, 8])]
    same, over, other = [5, 6, 9, 9], [4, 4], [5, 7, 1]
    assert siblings(along, [[same, over, other], [[7, 8, 1]], []]) == [(1, State(0, 1, PROMPT, [5, 7]))]
    assert siblings(along, [[same], [[7, 9, 1]], []]) == [(2, State(0, 2, PROMPT, [5, 6, 7, 9]))]
    # The next text begins with its prompt, which is no sibling's.
    assert siblings([along[1], State(1, 0, PROMPT, [])], [[other], []]) == []


def test_branches_go_on_from_their_states_with_the_values_of_these() -> None:
    env = env_of(min_new_tokens=0)
    policy = make_policy(env, model=make_model(ends=0.2))
    states = [State(0, 0, env.prompts[0], []), State(1, 0, env.prompts[1], [7, 8, 9]), State(2, 0, env.prompts[2], [4])]
    branches = _branch(policy, env, CriticTarget(), states, 8)
    contexts = [[*state.prompt.token_ids, *state.response] for state in states]
    assert branches.values == pytest.approx([plain_value(policy, context) for context in contexts], abs=1e-5)
    assert branches.returns[1].tolist() == [0.0] * 8  # 7 is odd, and the whole response is judged
    assert branches.returns[2].tolist() == [1.0] * 8
    assert {len(branch) for branch in branches.tokens[1]} <= {1, 2, 3}  # what the budget leaves
    assert len({tuple(branch) for branch in branches.tokens[0]}) > 1


def test_a_return_is_discounted_and_pays_for_the_kl_and_the_missing_end_of_what_follows() -> None:
    env = env_of(reward=lambda prompts, completions, **_: [3.0] * len(completions), min_new_tokens=0)
    policy, other = (
        make_policy(env, model=make_model(ends=0.3)),
        make_policy(env, model=make_model(ends=0.3, sharp=0.1)),
    )
    target = CriticTarget(Reference(other.lm), kl_coef=0.5, missing_eos_penalty=2.0, gamma=0.9)
    state = State(0, 0, env.prompts[0], [7, 8])
    branches = _branch(policy, env, target, [state], 12)
    cut = 0
    for tokens, paid in zip(branches.tokens[0], branches.returns[0], strict=True):
        context, expected = [*state.prompt.token_ids, *state.response], 0.0
        for step, token in enumerate(tokens):
            ratio = [float(plain_log_probs(writer, context, 2 + step)[token]) for writer in (policy, other)]
            expected -= 0.9**step * 0.5 * (ratio[0] - ratio[1])
            context.append(token)
        ended = tokens[-1] == env.eos_token_id
        cut += not ended
        expected += 0.9 ** (len(tokens) - 1) * (3.0 if ended else 1.0)
        assert paid == pytest.approx(expected, abs=1e-4)
    assert 0 < cut < 12


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_an_untrained_critic_and_single_branches_are_refused() -> None:
    env = env_of()
    with pytest.raises(ValueError, match="Expected a trained critic"):
        examine_critic(make_policy(env, randomize=False), env, CriticTarget())
    for sizes in ((1, 2, 2), (2, 1, 2), (2, 2, 1)):
        with pytest.raises(ValueError, match="to be an integer of at least 2, got 1"):
            examine_critic(make_policy(env), env, CriticTarget(), *sizes)
    assert len(env.prompts) == len(PROMPTS)


def test_an_exact_divergence_is_paid_for_the_contexts_after_the_state_alone() -> None:
    env = env_of(reward=lambda completions, **_: [3.0] * len(completions))
    policy, other = make_policy(env, min_new_tokens=LENGTH), make_policy(env, min_new_tokens=LENGTH)
    with torch.no_grad():
        for parameter in other.lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    target = CriticTarget(Reference(other.lm), kl_coef=0.5, kl_estimator="exact")
    last, first = State(0, 0, env.prompts[0], [7] * (LENGTH - 1)), State(0, 0, env.prompts[0], [])
    branches = _branch(policy, env, target, [last, first], 4)
    assert branches.returns[0].tolist() == [3.0] * 4  # after its token there is no further context
    assert (branches.returns[1] < 3.0).all()
