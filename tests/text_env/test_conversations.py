"""Instruct models: prompts in the tokenizer's chat template, from the data set to the saved policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model, tiny_tokenizer

from agents.algorithms.ppo import PPO
from agents.cli import main
from text_env.env import TextEnv
from text_env.prompts import Prompts
from text_env.rewards import make_reward
from text_env.vector_env import TextVectorEnv

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% if not loop.last or message['role'] != 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASKED = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "The movie?"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "I loved"}]


@pytest.fixture
def tokenizer() -> Any:
    instruct = tiny_tokenizer()
    instruct.chat_template = TEMPLATE
    return instruct


def recording(calls: list[dict[str, Any]]) -> Any:
    def reward(**batch: Any) -> list[float]:
        calls.append(batch)
        return [0.5 for _ in batch["prompts"]]

    return reward


def finish(env: TextVectorEnv, text: str, tokenizer: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write one text in a single row.
    :return: the first observation, and the last infos."""
    first, _ = env.reset(seed=0, options=options or None)
    infos: dict[str, Any] = {}
    for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]:
        _, _, terminated, _, infos = env.step([token])
    assert terminated.all()
    return first, infos["final_info"]


def spelt(tokenizer: Any, observation: dict[str, Any]) -> str:
    length = int(observation["prompt_length"][0, 0])
    return str(tokenizer.decode(observation["input_ids"][0, :length]))


def test_a_string_is_the_users_turn_where_the_tokenizer_has_a_chat_template(tokenizer: Any) -> None:
    prompts = Prompts(["The movie?"], tokenizer, 64)
    assert tokenizer.decode(prompts[0].token_ids) == "[user]The movie?<eos>[assistant]"
    assert prompts[0].messages == [{"role": "user", "content": "The movie?"}]
    assert prompts[0].text == "The movie?\n"
    for plain in (
        Prompts(["The movie?"], tokenizer, 64, chat_template=False),
        Prompts(["The movie?"], tiny_tokenizer(), 64),
    ):
        assert plain[0].messages is None
        assert tokenizer.decode(plain[0].token_ids) == plain[0].text == "The movie?"


def test_a_string_needs_a_chat_template_if_one_is_asked_for() -> None:
    with pytest.raises(ValueError, match="Expected a tokenizer with a chat template"):
        Prompts(["The movie?"], tiny_tokenizer(), 64, chat_template=True)


def test_a_conversation_is_written_in_the_template_and_an_assistants_last_words_are_gone_on_with(
    tokenizer: Any,
) -> None:
    prompts = Prompts([{"prompt": ASKED}, {"prompt": BEGUN}], tokenizer, 64)
    asked = "[system]Be short.<eos>[user]The movie?<eos>[assistant]"
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == [asked, f"{asked}I loved"]
    assert [prompt.text for prompt in prompts] == ["Be short.\nThe movie?\n", "Be short.\nThe movie?\nI loved"]


def test_a_rewards_text_is_what_trl_gives_of_a_conversation(tokenizer: Any) -> None:
    calls: list[dict[str, Any]] = []
    env = TextVectorEnv(
        1,
        tokenizer=tokenizer,
        prompts=[{"prompt": ASKED, "genre": "war"}],
        reward=recording(calls),
        max_prompt_tokens=64,
        max_new_tokens=16,
    )
    first, final = finish(env, " it was good", tokenizer)
    assert spelt(tokenizer, first) == "[system]Be short.<eos>[user]The movie?<eos>[assistant]"
    assert calls[0]["prompts"] == [ASKED]
    assert calls[0]["completions"] == [[{"role": "assistant", "content": " it was good"}]]
    assert calls[0]["genre"] == ["war"]
    assert final["prompt"][0] + final["completion"][0] == "Be short.\nThe movie?\n it was good"


def test_the_lexicon_reads_what_the_assistant_wrote_and_not_what_it_was_asked(tokenizer: Any) -> None:
    hateful = [{"role": "user", "content": "I hate this awful horrible movie. You?"}]
    env = TextVectorEnv(
        1, tokenizer=tokenizer, prompts=[hateful], reward="sentiment", max_prompt_tokens=64, max_new_tokens=16
    )
    assert finish(env, "I loved it", tokenizer)[1]["score"][0] > 0.5
    begun = [*hateful, {"role": "assistant", "content": "I loved"}]
    assert finish(env, " it", tokenizer, prompt=[begun])[1]["score"][0] > 0.5


def test_a_reset_takes_strings_conversations_and_token_ids(tokenizer: Any) -> None:
    calls: list[dict[str, Any]] = []
    env = TextVectorEnv(
        1, tokenizer=tokenizer, prompts=["The movie?"], reward=recording(calls), max_prompt_tokens=64, max_new_tokens=16
    )
    ids = tokenizer("[user]What?<eos>[assistant]")["input_ids"]
    for prompt, expected in (
        ("I?", "[user]I?<eos>[assistant]"),
        (ASKED, "[system]Be short.<eos>[user]The movie?<eos>[assistant]"),
        (ids, "[user]What?<eos>[assistant]"),
    ):
        first, _ = finish(env, "good", tokenizer, prompt=[prompt])
        assert spelt(tokenizer, first) == expected
    assert [call["prompts"][0][-1]["role"] for call in calls] == ["user"] * 3
    scalar = TextEnv(
        tokenizer=tokenizer, prompts=["The movie?"], reward=recording(calls), max_prompt_tokens=64, max_new_tokens=16
    )
    observation, info = scalar.reset(options={"prompt": ASKED})
    assert observation["prompt_length"][0] == len(
        tokenizer(spelt(tokenizer, first := finish(env, "x", tokenizer, prompt=[ASKED])[0]))["input_ids"]
    )
    assert info["prompt"] == "Be short.\nThe movie?\n"
    assert (observation["input_ids"] == first["input_ids"][0]).all()


def test_a_conversation_in_an_environment_of_plain_texts_is_refused() -> None:
    env = TextVectorEnv(
        1,
        tokenizer=tiny_tokenizer(),
        prompts=["The movie"],
        reward="sentiment",
        max_prompt_tokens=64,
        max_new_tokens=16,
    )
    with pytest.raises(ValueError, match="Expected a string or token ids as a prompt"):
        env.reset(options={"prompt": [ASKED]})


def test_a_template_that_refuses_a_conversation_says_which(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"refuses \[\{'role': 'system'.*roles must alternate"):
        Prompts([ASKED], tokenizer, 64)


def test_an_overlong_conversation_is_an_error_that_counts_the_template(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"at most max_prompt_tokens=8 tokens, got \d+, its chat template's included"):
        Prompts([ASKED], tokenizer, 8)
    with pytest.raises(ValueError, match="Expected overlong_prompts='error' with conversations"):
        Prompts([ASKED], tokenizer, 8, "truncate_left")


def test_an_assistant_that_says_nothing_is_scored_alike_alone_and_among_others(tokenizer: Any) -> None:
    env = TextVectorEnv(
        1,
        tokenizer=tokenizer,
        prompts=[ASKED],
        reward="builtin",
        max_prompt_tokens=64,
        max_new_tokens=16,
        shaping="builtin",
    )
    assert np.isfinite(finish(env, "", tokenizer)[1]["score"][0])
    reward, silence = make_reward("builtin"), [{"role": "assistant", "content": ""}]
    among = reward(prompts=[ASKED, ASKED], completions=[silence, [{"role": "assistant", "content": "I loved it"}]])
    alone = reward(prompts=[ASKED], completions=[silence])
    assert among[0] == pytest.approx(alone[0], abs=1e-5)
    assert among[0] != among[1]


def test_an_instruct_model_is_trained_evaluated_and_sampled_by_the_command_line(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in (ASKED, BEGUN)) + "\n")
    sizes = ["--max-prompt-tokens", "64", "--max-new-tokens", "6", "--n-episodes", "4", "--total-timesteps", "20"]
    place = ["--prompts", str(tmp_path / "prompts.jsonl"), "--run-dir", str(tmp_path / "run"), "--no-progress"]
    assert main(["train", "--model", str(tmp_path / "model"), "--reward", "sentiment", *sizes, *place]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {"Be short.\nThe movie?\n", "Be short.\nThe movie?\nI loved"}
    policy = ["--policy", str(tmp_path / "run" / "policy")]
    assert main(["evaluate", *policy, "--prompts", str(tmp_path / "prompts.jsonl"), "--episodes", "4"]) == 0
    capsys.readouterr()
    assert main(["sample", *policy, "--prompt", "The movie?", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("The movie?\n")


def test_what_is_trained_on_is_the_template_with_the_response_after_it(tokenizer: Any) -> None:
    env = TextVectorEnv(
        2, tokenizer=tokenizer, prompts=[ASKED], reward="sentiment", max_prompt_tokens=64, max_new_tokens=6
    )
    model = PPO("CausalLMPolicy", env, n_episodes=2, policy_kwargs={"model": tiny_model("llama", tokenizer)}, seed=0)
    model.learn(4)
    samples = model.buffer.pack(range(2))  # type: ignore[arg-type]
    length = int(samples.observations["prompt_length"][0, 0])
    begun = tokenizer.decode(samples.observations["input_ids"][0, :length])
    assert begun == "[system]Be short.<eos>[user]The movie?<eos>[assistant]"
    assert not samples.observations["action_mask"][:, : length - 1].any()


def test_a_special_token_that_ends_a_turn_can_stop_a_text_and_is_no_part_of_it(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    turn_end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    env = TextVectorEnv(
        1,
        tokenizer=tokenizer,
        prompts=[ASKED],
        reward="sentiment",
        max_prompt_tokens=64,
        max_new_tokens=16,
        stop=["<end_of_turn>", "bad"],
    )
    env.reset(seed=0)
    for token in tokenizer(" was good")["input_ids"]:
        assert not env.step([token])[2].any()
    _, _, terminated, _, infos = env.step([turn_end])
    assert terminated.all()
    assert infos["final_info"]["finish_reason"][0] == "stop"
    assert infos["final_info"]["completion"][0] == " was good"
    _, final = finish_by(env, tokenizer(" was bad")["input_ids"])
    assert final["completion"][0] == " was bad"  # an ordinary stop string is kept


def finish_by(env: TextVectorEnv, tokens: list[int]) -> tuple[Any, dict[str, Any]]:
    """Write tokens, the last of which must end the text.
    :return: the last observation and final info."""
    observation, _ = env.reset(seed=0)
    for token in tokens[:-1]:
        observation, _, terminated, _, _ = env.step([token])
        assert not terminated.any()
    observation, _, terminated, _, infos = env.step(tokens[-1:])
    assert terminated.all()
    return observation, infos["final_info"]


TRIMS = TEMPLATE.replace("message['content'] }}", "message['content'] | trim }}")


@pytest.mark.parametrize(
    ("template", "opening", "shown"),
    [
        (TRIMS, "Sure,\n", "Sure,"),
        (TRIMS, "  Sure, ", "Sure,"),
        (TRIMS, "\n", ""),
        (TEMPLATE, "Sure,\n", "Sure,\n"),
        (TEMPLATE, "  Sure,\n", "  Sure,\n"),
        (TEMPLATE.replace("message['content'] }}", "message['content'].rstrip() }}"), " Sure, ", " Sure,"),
    ],
)
def test_rewards_are_shown_the_opening_words_that_the_policy_was_shown(
    tokenizer: Any, template: str, opening: str, shown: str
) -> None:
    tokenizer.chat_template = template
    conversation = [{"role": "user", "content": "The movie? "}, {"role": "assistant", "content": opening}]
    calls: list[dict[str, Any]] = []
    env = TextVectorEnv(
        1,
        tokenizer=tokenizer,
        prompts=[conversation],
        reward=recording(calls),
        max_prompt_tokens=64,
        max_new_tokens=16,
    )
    for options in ({}, {"prompt": [conversation]}):
        first, final = finish(env, "it was", tokenizer, **options)
        asked = "The movie?" if template is TRIMS else "The movie? " if template is TEMPLATE else "The movie?"
        assert spelt(tokenizer, first) == f"[user]{asked}<eos>[assistant]{shown}"
        assert calls[-1]["prompts"] == [[{"role": "user", "content": asked}, {"role": "assistant", "content": shown}]]
        assert final["prompt"][0] == f"{asked}\n{shown}"


def test_a_template_that_rewrites_the_opening_words_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("message['content'] }}", "message['content'] | replace('Sure', 'No') }}")
    with pytest.raises(ValueError, match="Sure"):
        Prompts([[*ASKED, {"role": "assistant", "content": "Sure"}]], tokenizer, 64)
