"""Which kernels compute attention: cuDNN's are left out, in the forward pass and where layers are computed again."""

from __future__ import annotations

import pytest
import torch
from learners import make_env, make_policy, observation_of

from agents.models.attention import without_cudnn_attention


@pytest.fixture(autouse=True)
def cudnn_as_it_was() -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_is_left_out_on_cuda_alone_and_only_within() -> None:
    with without_cudnn_attention(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        with without_cudnn_attention(torch.device("cuda")):
            pass
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with without_cudnn_attention(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled()


def test_an_error_leaves_it_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError), without_cudnn_attention(torch.device("cuda")):
        _ = 1 / 0
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_every_attention_of_rollout_and_update_is_computed_without_cudnn(
    gradient_checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def recorded(device: torch.device) -> object:
        return without_cudnn_attention(torch.device("cuda"))

    for place in ("causal_lm", "recompute"):
        monkeypatch.setattr(f"agents.models.{place}.without_cudnn_attention", recorded)
    policy = make_policy(make_env(max_prompt_tokens=32), "llama", gradient_checkpointing=gradient_checkpointing)
    for layer in policy.lm.backbone.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: asked.append(torch.backends.cuda.cudnn_sdp_enabled()))
    observation = observation_of([[5, 6, 7], [8, 9, 4]], [2, 2], 40)
    with torch.no_grad():
        policy(observation)
    n_rollout = len(asked)
    _, log_prob, _ = policy.evaluate_actions(observation, torch.tensor([3, 4]))
    n_forward = len(asked)
    log_prob.sum().backward()
    assert n_rollout > 0
    assert n_forward > n_rollout
    assert (len(asked) > n_forward) == gradient_checkpointing
    assert not any(asked)
