"""A Hugging Face sequence classifier as a reward.

Notation: B texts in a batch, T tokens in the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from text_env.chat_templates import apply_chat_template
from text_env.finished_texts import ASSISTANT, Messages, assistant_texts, split_opening, written
from text_env.pretrained_files import load_pretrained, not_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def reward_normalization(config: Any) -> tuple[float, float]:
    """
    :param config: the configuration of a reward model.
    :return: the mean and the standard deviation that the model's scores are normalised with: ``reward_mean`` and
        ``reward_std`` of the configuration, or 0 and 1.
    """
    return float(getattr(config, "reward_mean", 0.0)), float(getattr(config, "reward_std", 1.0))


class _LastToken:
    """Gives a classifier that is made from a decoder the logits of the last token that its attention mask covers.

    transformers' own forward pass computes the logits of every token, and then picks those of the last token that is
    not ``config.pad_token_id``. That is another token wherever the batch is padded with another id, and wherever the
    text itself ends with that id, as most conversations do whose tokenizer pads with EOS. These hooks write the right
    logits into every place, so that it does not matter which place is picked.
    """

    def __init__(self) -> None:
        self.attention_mask: Any = None  # [B, T], of the forward pass that is running

    def remember_mask(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.attention_mask = kwargs.get("attention_mask")

    def pool(self, module: Any, args: tuple[Any, ...], logits: Any) -> Any:
        mask = self.attention_mask
        if mask is None or logits.ndim != 3 or mask.ndim != 2 or mask.shape[1] != logits.shape[1]:
            return None
        mask = mask.to(logits.device)
        places = mask.new_ones(mask.shape).cumsum(1)
        last = ((mask != 0) * places).argmax(dim=1)  # [B]
        rows = mask.new_ones(len(mask)).cumsum(0) - 1
        return logits[rows, last][:, None].expand_as(logits)


# The module that turns a token's hidden state into logits is called so, except in these classes.
_HEADS = {"CTRLForSequenceClassification": "classifier", "ModernBertDecoderForSequenceClassification": "classifier"}


def _head(model: Any) -> Any:
    """The head of a classifier that judges a text by its last token; None: it is a classifier of another kind."""
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    if classifier.config.is_encoder_decoder:
        return None
    return getattr(classifier, _HEADS.get(type(classifier).__name__, "score"), None)


def pool_by_attention_mask(model: Any) -> list[Any]:
    """Let a classifier that judges a text by its last token find that token by the attention mask.

    :param model: a sequence classifier, possibly inside a PEFT model. Nothing is done to one of another kind, such as
        an encoder, or an encoder and decoder.
    :return: the handles of the hooks; ``handle.remove()`` takes a hook away.
    """
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = _head(classifier)
    if head is None:
        return []
    last = _LastToken()
    return [
        classifier.register_forward_pre_hook(last.remember_mask, with_kwargs=True),
        head.register_forward_hook(last.pool),
    ]


@contextmanager
def _scoring(model: Any, pad_token_id: int) -> Iterator[None]:
    """While texts are scored, the model pools by the attention mask and has a pad token; then it is as before."""
    config = model.config.get_text_config()
    unset = getattr(config, "pad_token_id", None) is None
    handles = pool_by_attention_mask(model)
    if unset:
        config.pad_token_id = pad_token_id  # without one, transformers refuses batches; which one it is makes no odds
    try:
        yield
    finally:
        if unset:
            config.pad_token_id = None
        for handle in handles:
            handle.remove()


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary position embeddings in a model: one for all its layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(kind["rope_type"]) for kind in kinds if "rope_type" in kind}


class SequenceClassifierReward:
    """A Hugging Face sequence classifier as a reward. It has its own tokenizer, so it is given texts and not token ids.

    The score of a text is the logit of a reward model with one output, or the log-odds of one label of a classifier
    with several. If the model's configuration has ``reward_mean`` and ``reward_std``, scores are normalised with them.

    :param model: a directory, a hub name, or a live model (which stays on its device and keeps its dtype).
    :param tokenizer: a live tokenizer or its name; None means the tokenizer saved beside the model.
    :param batch_size: the number of texts in a forward pass.
    :param device: the device of the model. ``"auto"`` is CUDA if it is available, else the CPU.
    :param dtype: the type of the weights: ``"float32"``, ``"bfloat16"``, …; ``"auto"`` is the type that the model was
        saved in on CUDA, and float32 on a CPU, which has few kernels for half precision.
    :param max_length: longer texts are cut to this number of tokens (on the tokenizer's truncation side). None cuts
        nothing, so that a text that is too long for the model is an error rather than the score of another text.
    :param label: the name or the index of the label whose log-odds are the score. With two labels the default is the
        second.
    :param chat_template: None: conversations are written in the chat template of the reward model's own tokenizer, or
        if it has none, the assistant's last turn is scored; plain texts are scored as they are. True: plain texts are
        written in the template too, as the turns of a user and an assistant. False: the template is never used. A text
        that the template has written is tokenised without further special tokens, as TRL does.
    :raises ValueError: if there is no such model, the label is missing or unknown, the tokenizer cannot pad, or a chat
        template is asked for and the tokenizer has none.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        device: str = "auto",
        dtype: str = "auto",
        max_length: int | None = None,
        label: str | int | None = None,
        chat_template: bool | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        for argument, number in (("batch_size", batch_size), ("max_length", 1 if max_length is None else max_length)):
            if not isinstance(number, int | np.integer) or number < 1:
                raise ValueError(f"Expected {argument} to be an integer of at least 1, got {number!r}.")
        if dtype != "auto" and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
            raise ValueError(f"Expected dtype to be 'auto' or one of PyTorch's, such as 'bfloat16', got {dtype!r}.")
        self.source: str | None = None  # the directory or hub name that the model was loaded from
        if isinstance(model, str | Path):
            self.name, self.source = Path(model).name, str(model)
            try:
                target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
            except RuntimeError as error:
                raise ValueError(f"Expected device to be 'auto' or one of PyTorch's; {device!r}: {error}") from error
            if dtype == "auto" and target.type == "cpu":
                dtype = "float32"
            try:
                loaded = load_pretrained(AutoModelForSequenceClassification, model, dtype=dtype)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"Expected a directory or hub name of a Hugging Face sequence classifier, got {str(model)!r}, "
                    f"{not_loaded(model, str(error))}"
                ) from error
            self.model: PreTrainedModel = loaded.to(target)
            tokenizer = str(model) if tokenizer is None else tokenizer
        else:
            self.name = type(model).__name__
            self.model = model
            if tokenizer is None:
                raise ValueError("Expected the tokenizer of a live reward model, got None: pass tokenizer=.")
        self.model.eval()
        self.tokenizer: PreTrainedTokenizerBase = (
            load_pretrained(AutoTokenizer, tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        )
        self.batch_size, self.max_length, self.chat_template = batch_size, max_length, chat_template
        if chat_template and not self.tokenizer.chat_template:
            raise ValueError(
                f"Expected the tokenizer of reward {self.name!r} to have a chat template, since chat_template=True "
                f"asks for it; it has none. Leave chat_template out to score texts as they are."
            )
        config = self.model.config
        self.mean, self.std = reward_normalization(config)
        self._label = self._label_index(label)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        if pad is None and eos is None:
            raise ValueError(
                f"Expected the tokenizer of reward {self.name!r} to have a pad or an eos token; it has none."
            )
        # Nobody reads the padding, but the model must have an embedding for it: a pad token may have been added later.
        filler = int(eos if pad is None else pad)
        self._pad_token_id = filler if filler < config.get_text_config().vocab_size else 0
        kinds = _rope_types(config.get_text_config())
        # Above the original length, what these rotary embeddings do to a text depends on the longest text in the batch
        # ("longrope"), and even on the longest text of earlier batches ("dynamic").
        self._longest = int(config.get_text_config().max_position_embeddings) if "dynamic" in kinds else None
        # Whether texts of different lengths can share a forward pass; None: it is tried with the first such texts.
        self._may_pad: bool | None = False if "longrope" in kinds else None

    @property
    def _blank(self) -> str:
        """The text that is scored in place of an empty one, such as an empty turn: a model needs at least one token."""
        if self.tokenizer("")["input_ids"]:
            return ""  # this tokenizer adds a token itself
        return str(self.tokenizer.bos_token or self.tokenizer.eos_token or self.tokenizer.pad_token)

    def _label_index(self, label: str | int | None) -> int | None:
        labels = self.model.config.id2label or {}
        if len(labels) == 1:
            return None
        if label is None and len(labels) == 2:
            return 1
        ids: dict[Any, Any] = self.model.config.label2id or {}
        index = ids.get(label, label)
        if not isinstance(index, int) or index not in labels:
            raise ValueError(
                f"Reward {self.name!r} has {len(labels)} labels: expected label= to be one of {list(labels.values())} "
                f"or its index, got {label!r}."
            )
        return index

    @staticmethod
    def _turns(prompt: str | Messages, completion: str) -> Messages:
        """The whole conversation, which ends with the assistant's complete turn."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        before, opening = split_opening(messages)
        return [*before, {"role": ASSISTANT, "content": opening + completion}]

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **_: Any
    ) -> list[float]:
        conversational = any(not isinstance(prompt, str) for prompt in prompts)
        template = bool(self.tokenizer.chat_template) if self.chat_template is None else self.chat_template
        templated = template and (conversational or self.chat_template is True)
        texts: list[str]
        if templated:
            turns = [self._turns(prompt, text) for prompt, text in zip(prompts, written(completions), strict=True)]
            texts = apply_chat_template(self.tokenizer, turns)
        else:
            texts = [text or self._blank for text in assistant_texts(prompts, completions)]
        # Without return_tensors, this neither pads nor needs a pad token.
        encoded: Any = self.tokenizer(
            texts,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            add_special_tokens=not templated,  # the template has written them
            # Some encoders take no attention mask, and their tokenizers then make none.
            return_attention_mask=None if _head(self.model) is None else True,
        )
        rows = [{name: encoded[name][index] for name in encoded} for index in range(len(texts))]
        self._check_lengths(texts, [len(row["input_ids"]) for row in rows])
        # Texts of similar length in a batch need little padding.
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        scores = np.empty(len(rows))
        with _scoring(self.model, self._pad_token_id):
            for chosen in self._batches(order, rows):
                scores[chosen] = self._values([rows[index] for index in chosen])
        return ((scores - self.mean) / self.std).tolist()

    def _check_lengths(self, texts: Sequence[str], lengths: Sequence[int]) -> None:
        for text, length in zip(texts, lengths, strict=True):
            if not length:
                raise ValueError(
                    f"Expected texts of at least one token, got {text!r}, of which the tokenizer of reward "
                    f"{self.name!r} makes none."
                )
            if self._longest is not None and length > self._longest:
                raise ValueError(
                    f"Expected texts of at most {self._longest} tokens, since the model of reward {self.name!r} has "
                    f"dynamic rotary embeddings, with which the score of a longer text would depend on the texts "
                    f"before it; got {length} tokens: pass max_length={self._longest}, or use a model with another "
                    f"rope_type."
                )

    def _batches(self, order: Sequence[int], rows: Sequence[dict[str, list[int]]]) -> Iterator[list[int]]:
        """The numbers of the texts of each forward pass. ``order`` holds them sorted by length."""
        first = 0
        while first < len(order):
            chosen = list(order[first : first + self.batch_size])
            lengths = [len(rows[index]["input_ids"]) for index in chosen]
            if lengths[0] < lengths[-1]:
                if self._may_pad is None:
                    self._may_pad = self._ignores_padding([rows[index] for index in chosen])
                if not self._may_pad:
                    chosen = chosen[: lengths.count(lengths[0])]
            yield chosen
            first += len(chosen)

    def _ignores_padding(self, rows: Sequence[dict[str, list[int]]]) -> bool:
        """Whether the first of these texts, which needs most padding, has the same score among the others as alone.

        Not every encoder does as the attention mask tells it: FNet mixes all places of a batch, XLNet reads the last.
        """
        import torch

        together, alone = self._values(rows)[0], self._values(rows[:1])[0]
        # In float32 that is 1e-4; a model in half precision has other rounding errors in a batch of another shape.
        tolerance = torch.finfo(self.model.dtype).eps ** 0.5 / 3
        return bool(abs(together - alone) <= tolerance * max(1.0, abs(alone)))

    def _values(self, rows: Sequence[dict[str, list[int]]]) -> NDArray[np.float64]:
        """The scores of B tokenised texts in one forward pass, not normalised yet, float64 [B]."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        filler = {"input_ids": self._pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        inputs = {
            name: torch.tensor([[*row[name], *[filler.get(name, 0)] * (longest - len(row[name]))] for row in rows])
            for name in rows[0]
        }
        with torch.inference_mode():
            output = self.model(**{name: values.to(self.model.device) for name, values in inputs.items()})
            logits = output.logits.double()  # [B, labels]
            values = logits[:, 0] if self._label is None else self._log_odds(logits, self._label)
        scores: NDArray[np.float64] = values.cpu().numpy()
        return scores

    @staticmethod
    def _log_odds(logits: Any, label: int) -> Any:
        others = [index for index in range(logits.shape[1]) if index != label]
        return logits[:, label] - logits[:, others].logsumexp(dim=1)  # two labels: the difference of their logits


REWARD_KWARGS = ("batch_size", "device", "dtype", "max_length", "label", "chat_template")
"""The arguments of :class:`SequenceClassifierReward` that :func:`shared_classifier` takes."""

# A classifier made by name is shared as long as it is in use: 64 scalar environments need one reward model, not 64.
_shared: WeakValueDictionary[tuple[Any, ...], SequenceClassifierReward] = WeakValueDictionary()


def shared_classifier(model: str | Path, name: str | None = None, **kwargs: Any) -> SequenceClassifierReward:
    """
    :param model: a directory or a hub name.
    :param name: what the reward is called; None: as :class:`SequenceClassifierReward` calls it.
    :param kwargs: the arguments :data:`REWARD_KWARGS`.
    :return: the classifier. It is the same object as long as somebody holds it, the arguments are the same, and the
        name stands for the same files.
    """
    key = (*_identity(model), name, repr(sorted(kwargs.items())))
    reward = _shared.get(key)
    if reward is None:
        reward = _shared[key] = SequenceClassifierReward(model, **kwargs)
        reward.name = name or reward.name
    return reward


def _identity(model: str | Path) -> tuple[Any, ...]:
    """What a name stands for at this moment: a directory and the state of its files, or a model on the hub."""
    directory = Path(model)
    if not directory.is_dir():
        return (str(model),)
    # A relative name means another directory after a chdir, and training may write a model into the same directory.
    directory = directory.resolve()
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    states = [(str(path), path.stat()) for path in files]
    return (str(directory), *((path, state.st_mtime_ns, state.st_size, state.st_ino) for path, state in states))
