"""Who is examined: a training as it would be, made stage by stage as far as the checks ask for it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from peft import PeftModel
from stable_baselines3.common.utils import get_device, set_random_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents.models.adapter import unwrapped
from agents.models.pretrained import add_lora, load_causal_lm
from agents.policies.causal_lm_policy import CausalLMPolicy, load_policy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sampling import collect_texts
from agents.runs.config import EnvConfig, TrainConfig, lora_kwargs
from agents.state.devices import check_device
from text_env.finished_texts import FinishedTexts
from text_env.prompts import N_INSPECTED, Prompt
from text_env.tokenization import load_tokenizer
from text_env.vector_env import TextVectorEnv

Made = TypeVar("Made")


class Finding(NamedTuple):
    """What a check found.

    :param verdict: ``"ok"``; ``"warning"``, which training survives; ``"problem"``, which it does not, or by which it
        learns something else than is meant; ``"skipped"``, if what the check needs could not be made.
    :param found: what was found, in a sentence.
    :param advice: what to do, in a sentence; empty where there is nothing to do.
    """

    verdict: Literal["ok", "warning", "problem", "skipped"]
    found: str
    advice: str = ""


class StageFailed(Exception):
    """Something that is examined could not be made.

    :param stage: what it is.
    :param error: why.
    """

    def __init__(self, stage: str, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.stage = stage


class Written(NamedTuple):
    """Texts that the policy has written, as in training.

    :param buffer: the texts as tokens, with the log-probabilities at which each token was chosen.
    :param texts: the texts as rewards are given them.
    :param seconds: how long writing took.
    """

    buffer: EpisodeBuffer
    texts: FinishedTexts
    seconds: float


class Patient:
    """The parts of a training. Each is made when a check first asks for it, and once; a part that can't be made is a
    :class:`StageFailed` for whoever asks.

    :param run: the training, with all choices made (:func:`agents.runs.algorithms.resolved`).
    :param n_texts: the number of texts that the model writes.
    :param n_tokens: the most tokens of such a text.
    """

    def __init__(self, run: TrainConfig, n_texts: int, n_tokens: int) -> None:
        assert run.model is not None
        self.run = run
        self.name = run.model
        self.n_texts = n_texts
        self.n_tokens = n_tokens
        self._made: dict[str, Any] = {}

    def _once(self, stage: str, make: Callable[[], Made]) -> Made:
        if stage not in self._made:
            try:
                self._made[stage] = make()
            except StageFailed as earlier:  # what this stage needs is missing
                self._made[stage] = earlier
            except Exception as error:  # whatever a model, a tokenizer or a reward of somebody's raises
                self._made[stage] = StageFailed(stage, error)
        if isinstance(self._made[stage], StageFailed):
            raise self._made[stage]
        return cast(Made, self._made[stage])

    # ---- prompts --------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the environment."""
        return self._once("tokenizer", lambda: load_tokenizer(self.run.env.tokenizer or self.name))

    @property
    def everything(self) -> TextVectorEnv:
        """The environment with all prompts, however long they are; nothing judges its texts."""
        assert self.tokenizer is not None  # without one, that is what is said
        return self._once("prompts", lambda: self._env(1, max_prompt_tokens=None, **self.run.env.unjudged()))

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts; of a task, which can make any number, the first 64."""
        prompts = self.everything.prompts
        return list(prompts[: N_INSPECTED if self.run.env.has_task else len(prompts)])

    @property
    def room(self) -> int | None:
        """``max_prompt_tokens`` of the training; None: as many as the longest prompt has."""
        env = self.run.env
        if env.has_task and env.max_prompt_tokens == EnvConfig.max_prompt_tokens:
            said = env.made_task().settings
            return cast("int | None", said.get("max_prompt_tokens", EnvConfig.max_prompt_tokens))
        return env.max_prompt_tokens

    def chosen_prompts(self) -> list[dict[str, Any]]:
        """
        :return: so many prompts as there are texts to write, as rows with their columns. Those that are too long are
            left out, unless all are.
        """
        prompts, room = self.prompts, self.room
        fitting = [prompt for prompt in prompts if room is None or len(prompt.token_ids) <= room]
        fitting = fitting or sorted(prompts, key=lambda prompt: len(prompt.token_ids))[: self.n_texts]
        chosen = [fitting[i * len(fitting) // self.n_texts] for i in range(self.n_texts)]
        return [{"prompt": prompt.messages or prompt.text, **prompt.columns} for prompt in chosen]

    def _env(self, num_envs: int, **overrides: Any) -> TextVectorEnv:
        return self.run.env.make(num_envs, self.name, **{"group_size": 1, **overrides})

    # ---- the model ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The model as it was loaded, on the device of the training."""

        def load() -> PreTrainedModel | PeftModel:
            check_device(self.run.device)
            return load_causal_lm(self.name, self.run.dtype).eval().to(get_device(self.run.device))

        return self._once("model", load)

    @property
    def low_precision(self) -> bool:
        """Whether numbers have fewer bits than those of float32."""
        dtype = unwrapped(self.model).dtype if self.run.autocast is None else getattr(torch, self.run.autocast)
        return bool(torch.finfo(dtype).eps > torch.finfo(torch.float32).eps)

    @property
    def adapted(self) -> PreTrainedModel | PeftModel:
        """The model with the adapter that is to be trained, if there is to be one."""
        lora = lora_kwargs(self.run)
        model = self.model
        return self._once("adapter", lambda: model if lora is None else add_lora(model, lora))

    @torch.no_grad()
    def probabilities(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ask the model itself, by a call of transformers and nothing else.

        :param input_ids: int64 [B, T].
        :return: the probabilities of the next token, [B, T, V].
        """
        model = unwrapped(self.model)
        autocast = self.run.autocast
        dtype = None if autocast is None else getattr(torch, autocast)
        with torch.autocast(model.device.type, dtype=dtype, enabled=autocast is not None):
            logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
        return logits[..., : self.everything.episodes.vocabulary].float().softmax(dim=-1)

    # ---- texts ----------------------------------------------------------------------------------------------------

    @property
    def env(self) -> TextVectorEnv:
        """The environment of a few prompts, in which the policy writes short texts that nothing judges."""

        def make() -> TextVectorEnv:
            budget = min(self.everything.max_new_tokens, self.n_tokens)
            cuts = self.run.env.overlong_prompts == "truncate_left"
            return self._env(
                self.n_texts,
                prompts=self.chosen_prompts(),
                max_prompt_tokens=self.room if cuts else None,
                max_new_tokens=budget,
                min_new_tokens=min(self.everything.min_new_tokens, budget),
                **self.run.env.unjudged(),
            )

        return self._once("environment", make)

    @property
    def policy(self) -> CausalLMPolicy:
        """The policy that is to be trained."""
        run, env, model = self.run, self.env, self.adapted

        def make() -> CausalLMPolicy:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".* is run without prefix cache")  # the memo's check says so
                return load_policy(model, env, run.device, run.dtype, run.temperature, autocast=run.autocast)

        return self._once("policy", make)

    @property
    def written(self) -> Written:
        """A text for each of the prompts."""
        env, policy = self.env, self.policy

        def write() -> Written:
            set_random_seed(self.run.seed)
            prompts: Sequence[Prompt] = env.prompts[:]
            start = time.perf_counter()
            buffer, infos = collect_texts(policy, env, len(prompts), prompts=prompts)
            seconds = time.perf_counter() - start
            buffer.finalize()
            texts = FinishedTexts(
                prompts=[prompt.text for prompt in prompts],
                completions=[info["completion"] for info in infos],
                completion_ids=[part.tolist() for part in np.split(buffer.actions, buffer.starts[1:-1])],
                columns={name: [prompt.columns[name] for prompt in prompts] for name in env.prompts.columns},
                messages=[prompt.messages for prompt in prompts if prompt.messages is not None] or None,
            )
            return Written(buffer, texts, seconds)

        return self._once("texts", write)

    @property
    def reward(self) -> Any:
        """What judges the texts."""
        prompts = self.chosen_prompts()
        return self._once("reward", lambda: self._env(1, prompts=prompts, max_prompt_tokens=None).reward)
