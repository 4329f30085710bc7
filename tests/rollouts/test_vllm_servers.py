"""The client of vLLM's servers: what it asks, what it understands, and what it does when a server dies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import EOS, make_env, plain_log_probs, save_model
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from vllm_stand_in import StandIn, served

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.backend import Request, Sampling
from agents.rollouts.vllm_servers import NoServerLeft, VllmServers
from text_env.constraints import AllowedTokens
from text_env.vector_env import TextVectorEnv

REQUESTS = [Request([40 + i, 50, 60], 0, 100 + i) for i in range(6)]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture
def servers(model: str) -> Iterator[list[StandIn]]:
    with ExitStack() as stack:
        loaded = AutoModelForCausalLM.from_pretrained(model).eval()
        yield [stack.enter_context(served(StandIn(loaded))) for _ in range(2)]


def client(*servers: StandIn, **options: Any) -> VllmServers:
    return VllmServers([server.url for server in servers], **{"patience": 0.0, **options})


def policy_of(env: TextVectorEnv, model: str, **kwargs: Any) -> CausalLMPolicy:
    torch.manual_seed(0)
    spaces = env.single_observation_space, env.single_action_space
    known = {"eos_token_id": env.eos_token_ids, "min_new_tokens": env.min_new_tokens, "constraint": env.constraint}
    return CausalLMPolicy(*spaces, lambda _: 1e-2, model=model, **{**known, **kwargs})


def change(policy: CausalLMPolicy) -> None:
    """Somewhat other weights, of those that are trained."""
    with torch.no_grad():
        for parameter in policy.lm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapter"])
def test_texts_are_sampled_from_the_weights_that_were_sent_last(
    lora: Any, model: str, servers: list[StandIn], tmp_path: Path
) -> None:
    env = make_env()
    policy = policy_of(env, model, lora=lora)
    backend = client(servers[0], directory=tmp_path)
    for version in (1, 2):
        change(policy)
        backend.take_weights(policy, version)
        for request, written in zip(REQUESTS, backend.write(REQUESTS, Sampling.of(policy, env)), strict=True):
            assert written.version == version
            tokens = written.token_ids.tolist()
            assert len(tokens) == 8 or (tokens.index(EOS) == len(tokens) - 1 and len(tokens) < 8)
            with torch.no_grad():
                logits = policy.lm.model(torch.tensor([[*request.token_ids, *tokens]])).logits[0, 2:-1]
            expected = logits.log_softmax(dim=-1)[range(len(tokens)), tokens]
            assert np.abs(written.log_probs - expected.numpy()).max() < 1e-5
        assert len(list(tmp_path.iterdir())) == 1  # the weights before these are of no use any more
    assert len(servers[0].adapters) == (0 if lora is None else 1)


def test_a_text_is_one_request_with_a_seed_of_its_own_and_the_rest_of_its_budget(
    model: str, servers: list[StandIn]
) -> None:
    env = make_env(min_new_tokens=3, constraint=AllowedTokens(range(90)), max_new_tokens=6, stop=["xy", "z"])
    policy = policy_of(env, model, temperature=0.5)
    backend = client(servers[0])
    backend.take_weights(policy, 1)
    requests = [Request([40, 50], 0, 11), Request([40, 50, 60, 61], 2, 12), Request([40, 50, 60, 61, 62], 3, 13)]
    first = backend.write(requests, Sampling.of(policy, env))
    for request, body in zip(requests, sorted(servers[0].completions[-3:], key=lambda b: b["seed"]), strict=True):
        assert (body["prompt"], body["seed"]) == (request.token_ids, request.seed)
        assert body["max_tokens"] == 6 - request.step
        assert body.get("min_tokens", 0) == 3 - request.step
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.5, 1.0, 0, 0.0)
        assert (body["stop_token_ids"], body["ignore_eos"]) == ([EOS], True)
        assert (body["stop"], body["include_stop_str_in_output"]) == (["xy", "z"], True)
        assert body["allowed_token_ids"] == list(range(90))
    assert EOS not in first[0].token_ids[:3]
    assert max(max(one.token_ids) for one in first) < 90
    again = backend.write(requests, Sampling.of(policy, env))
    assert [one.token_ids.tolist() for one in again] == [one.token_ids.tolist() for one in first]
    context = [*requests[0].token_ids, *first[0].token_ids[:-1].tolist()]
    step = len(context) - 2
    logits = torch.log(torch.exp(plain_log_probs(policy, context, step))[:90])
    expected = (logits - logits.logsumexp(dim=-1))[first[0].token_ids[-1]]
    assert first[0].log_probs[-1] == pytest.approx(float(expected), abs=1e-5)


def test_logits_that_stand_for_no_token_are_never_sampled(tmp_path: Path) -> None:
    padded = tiny_model("llama", 320)
    padded.save_pretrained(tmp_path / "padded")
    env = make_env()
    policy = policy_of(env, str(tmp_path / "padded"), tokenizer=env.tokenizer)
    with served(StandIn(padded)) as server:
        backend = client(server)
        backend.take_weights(policy, 1)
        many = [Request([40], 0, seed) for seed in range(30)]
        written = backend.write(many, Sampling.of(policy, env))
        assert set(server.completions[-1]["logit_bias"].values()) == {-100.0}
        assert list(map(int, server.completions[-1]["logit_bias"])) == list(range(300, 320))
    assert max(max(one.token_ids) for one in written) < 300


def test_several_servers_share_the_texts(model: str, servers: list[StandIn]) -> None:
    env = make_env()
    policy = policy_of(env, model)
    for server in servers:
        server.seconds = 0.02
    backend = client(*servers)
    backend.take_weights(policy, 1)
    before = [len(server.completions) for server in servers]
    backend.write(REQUESTS, Sampling.of(policy, env))
    assert [len(server.completions) - n for server, n in zip(servers, before, strict=True)] == [3, 3]


def test_the_texts_of_a_server_that_dies_are_written_by_the_others(
    model: str, servers: list[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    env = make_env()
    policy = policy_of(env, model)
    alone = client(servers[1])
    alone.take_weights(policy, 1)
    expected = alone.write(REQUESTS, Sampling.of(policy, env))
    backend = client(*servers)
    backend.take_weights(policy, 1)
    servers[0].dies_after = len(servers[0].completions) + 1
    with caplog.at_level(logging.WARNING):
        written = backend.write(REQUESTS, Sampling.of(policy, env))
    assert [one.token_ids.tolist() for one in written] == [one.token_ids.tolist() for one in expected]
    assert caplog.text.count("is left out, and its texts are written by others") == 1
    assert servers[0].url in caplog.text
    # It is asked again whenever there are new weights, and takes part again.
    servers[0].restart()
    change(policy)
    backend.take_weights(policy, 2)
    before = len(servers[0].completions)
    assert {one.version for one in backend.write(REQUESTS, Sampling.of(policy, env))} == {2}
    assert len(servers[0].completions) > before


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a while"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapter"])
def test_the_only_server_may_come_back_and_is_given_the_weights_before_it_writes_again(
    lora: Any, waits: bool, model: str, servers: list[StandIn]
) -> None:
    env = make_env()
    policy = policy_of(env, model, lora=lora)
    change(policy)
    backend = client(servers[0], patience=30.0)
    backend.take_weights(policy, 1)
    expected = backend.write(REQUESTS, Sampling.of(policy, env))
    servers[0].restart()
    if waits:
        servers[0].dies_after = len(servers[0].completions)
        threading.Timer(1.0, servers[0].restart).start()
    written = backend.write(REQUESTS, Sampling.of(policy, env))
    for one, other in zip(written, expected, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert np.abs(one.log_probs - other.log_probs).max() < 1e-6


def test_a_server_that_is_not_there_yet_is_waited_for_and_that_is_said_once(
    model: str, servers: list[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    env = make_env()
    policy = policy_of(env, model)
    servers[0].dies_after = 0
    backend = client(servers[0], patience=30.0)
    threading.Timer(2.0, servers[0].restart).start()
    with caplog.at_level(logging.WARNING):
        backend.take_weights(policy, 1)
        assert len(backend.write(REQUESTS, Sampling.of(policy, env))) == len(REQUESTS)
    [said] = caplog.messages
    assert f"No server of vLLM answers ({servers[0].url}" in said
    assert "This waits for it, for 30 s at the longest" in said


def test_if_nobody_is_left_the_error_says_who_said_what_at_last(model: str, servers: list[StandIn]) -> None:
    env = make_env()
    policy = policy_of(env, model)
    backend = client(*servers)
    backend.take_weights(policy, 1)
    for server in servers:
        server.dies_after = 0
    with pytest.raises(NoServerLeft, match=rf"No server of vLLM answers \({servers[0].url}: .*{servers[1].url}: "):
        backend.write(REQUESTS[:1], Sampling.of(policy, env))
    with pytest.raises(NoServerLeft):
        backend.take_weights(policy, 2)


def test_a_text_at_which_every_server_fails_is_not_tried_for_ever(
    model: str, servers: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env()
    policy = policy_of(env, model)
    backend = client(*servers)
    backend.take_weights(policy, 1)
    monkeypatch.setattr("agents.rollouts.vllm_servers.WAITS", ())
    for server in servers:
        answers = server.answer
        server.answer = lambda path, body, answers=answers: (  # type: ignore[method-assign, misc]
            (500, "broken") if body and body.get("seed") == 1 else answers(path, body)
        )
    with pytest.raises(NoServerLeft, match=r"could not be written in 4 attempts.*status 500: 'broken'"):
        backend.write([Request([40, 50], 0, 1)], Sampling.of(policy, env))


def test_the_texts_at_which_one_server_fails_that_answers_all_else_are_written_by_the_others(
    model: str, servers: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env()
    policy = policy_of(env, model)
    backend = client(*servers)
    backend.take_weights(policy, 1)
    expected = backend.write(REQUESTS, Sampling.of(policy, env))
    monkeypatch.setattr("agents.rollouts.vllm_servers.WAITS", ())
    answer, failures = servers[0].answer, []
    servers[1].seconds = 0.02  # so that the other one has the least to do

    def failing(path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/completions":
            failures.append(body)
            return 500, "broken"
        return answer(path, body)

    servers[0].answer = failing  # type: ignore[method-assign]
    written = backend.write(REQUESTS, Sampling.of(policy, env))
    assert [one.token_ids.tolist() for one in written] == [one.token_ids.tolist() for one in expected]
    assert failures


def test_a_server_that_does_not_say_when_it_was_started_writes_all_the_same(model: str, servers: list[StandIn]) -> None:
    env = make_env()
    policy = policy_of(env, model)
    backend, answer = client(servers[0]), servers[0].answer
    silent = lambda path, body: (404, "Not Found") if path == "/metrics" else answer(path, body)  # noqa: E731
    servers[0].answer = silent  # type: ignore[method-assign]
    backend.take_weights(policy, 1)
    assert len(backend.write(REQUESTS, Sampling.of(policy, env))) == len(REQUESTS)
    assert [path for path, _ in servers[0].asked].count("/collective_rpc") == 1


def test_a_server_that_says_log_probabilities_of_another_distribution_is_refused(model: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    env = make_env()
    with served(StandIn(loaded, raw=True)) as server:
        backend = client(server)
        policy = policy_of(env, model)
        backend.take_weights(policy, 1)
        assert len(backend.write(REQUESTS[:1], Sampling.of(policy, env))) == 1  # nothing changes the distribution
        policy = policy_of(env, model, temperature=0.7)
        with pytest.raises(ValueError, match="Start it with --logprobs-mode processed_logprobs"):
            backend.write(REQUESTS[:1], Sampling.of(policy, env))


def test_a_server_for_shorter_texts_is_refused(model: str) -> None:
    env = make_env()
    policy = policy_of(env, model)
    with served(StandIn(AutoModelForCausalLM.from_pretrained(model).eval(), max_model_len=20)) as server:
        backend = client(server)
        backend.take_weights(policy, 1)
        with pytest.raises(ValueError, match="--max-model-len 24"):
            backend.write(REQUESTS[:1], Sampling.of(policy, env))


def test_a_server_that_takes_no_weights_says_how_it_must_be_started(model: str, servers: list[StandIn]) -> None:
    env = make_env()
    for lora, hint in ((None, "VLLM_SERVER_DEV_MODE=1"), (LORA, "--enable-lora")):
        server = servers[0]
        server.answer = lambda path, body: (  # type: ignore[method-assign]
            StandIn.answer(servers[0], path, body) if path == "/v1/models" else (404, {"detail": "Not Found"})
        )
        with pytest.raises(ValueError, match=rf"status 404.*{hint}"):
            client(server).take_weights(policy_of(env, model, lora=lora), 1)


def test_an_answer_without_token_ids_is_refused(model: str, servers: list[StandIn]) -> None:
    env = make_env()
    policy = policy_of(env, model)
    backend = client(servers[0])
    backend.take_weights(policy, 1)
    servers[0].answer = lambda path, body: (200, {"choices": [{"text": "a"}]})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"token_ids and logprobs, .* got .*'text': 'a'"):
        backend.write(REQUESTS[:1], Sampling.of(policy, env))


@pytest.mark.parametrize("answer", ["<html>", {}, {"data": []}, {"data": [{"id": "base"}]}, {"data": 3}, [], [1]])
def test_another_kind_of_server_is_named_in_the_error(answer: Any, model: str, servers: list[StandIn]) -> None:
    servers[0].answer = lambda path, body: (200, answer)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=rf"Expected {servers[0].url} to answer with the models that it serves"):
        client(servers[0]).take_weights(policy_of(make_env(), model), 1)


def test_an_answer_without_end_is_not_read_to_its_end(
    model: str, servers: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.rollouts.vllm_servers.LARGEST_ANSWER", 1000)
    servers[0].answer = lambda path, body: (200, {"data": "x" * 2000})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="to answer with at most 1,000 bytes"):
        client(servers[0]).take_weights(policy_of(make_env(), model), 1)


@pytest.mark.parametrize("urls", ["", "localhost:8000", "http://one:1,http://one:1", "http://one:1,two"])
def test_addresses_are_checked(urls: str) -> None:
    with pytest.raises(ValueError, match="Expected the addresses of servers of vLLM, each once"):
        VllmServers(urls)


def test_nobody_writes_before_the_servers_have_weights(model: str, servers: list[StandIn]) -> None:
    env = make_env()
    with pytest.raises(ValueError, match=r"take_weights\(\) before write\(\)"):
        client(servers[0]).write(REQUESTS, Sampling.of(policy_of(env, model), env))
