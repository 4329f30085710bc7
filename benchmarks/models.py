"""The models that are measured, and words for them.

Nothing here imports our packages: the peers build the very same model in their own environment.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCABULARY = 4096
PROMPT_TOKENS = 8
N_PROMPTS = 256
EPISODES = 64
RESPONSE = 32
PEERS = Path(__file__).parent.parent / ".venv-peers"
NEVER = -50.0  # as a logit beside others around 0: probability 0 for all purposes


class Subject(NamedTuple):
    """A model under measurement.

    :param model: the causal language model.
    :param tokenizer: its tokenizer.
    :param prompts: texts of exactly ``prompt_tokens`` tokens.
    :param masks_eos: whether EOS must be forbidden to keep lengths fixed; otherwise the model never writes it.
    :param episodes: how many texts are written side by side.
    :param response: the response budget, in tokens.
    :param prompt_tokens: how long every prompt is, in tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    masks_eos: bool
    episodes: int = EPISODES
    response: int = RESPONSE
    prompt_tokens: int = PROMPT_TOKENS

    def own_copy(self) -> Subject:
        """The same with a copy of the model: our policy may replace layers of the one that it is given."""
        return self._replace(model=copy.deepcopy(self.model))


def subject(name: str, device: torch.device) -> Subject:
    """
    :param name: ``"builtin"``, ``"gpt2-4m"`` or ``"smollm2"``.
    :param device: where it goes.
    :return: the model in the precision that the figures are stated for (float32; bfloat16 for smollm2 and on CUDA).
    """
    on_gpu = device.type == "cuda"
    if name == "gpt2-4m":
        model = gpt2_4m().to(device, torch.bfloat16 if on_gpu else torch.float32)
        return Subject(model, words(), word_prompts(), masks_eos=False)
    if name == "builtin":
        from text_env.builtin import LANGUAGE_MODEL  # the peers never ask for it

        directory = Path(LANGUAGE_MODEL)
    else:
        directory = PEERS / "smollm2"
    dtype = torch.bfloat16 if on_gpu or name == "smollm2" else torch.float32
    pretrained = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return Subject(pretrained, tokenizer, _exact_prompts(tokenizer), masks_eos=True)


def gpt2_config(**changes: Any) -> GPT2Config:
    """4 layers of width 256: 4.3 million parameters."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_positions": 512,
        "n_embd": 256,
        "n_layer": 4,
        "n_head": 4,
        # Without dropout on either side: ours never has any, and it would cost the other side time.
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        "eos_token_id": VOCABULARY - 2,
        "pad_token_id": VOCABULARY - 1,
        "bos_token_id": None,
    }
    return GPT2Config(**settings | changes)


def gpt2_4m(eos_hazard: float = 0.0, seed: int = 0, n_positions: int = 512) -> GPT2LMHeadModel:
    """A random GPT-2 whose texts end with a given probability at each token.

    GPT-2's head has no bias, so one hidden unit is made constant: it is 1 after the last layer norm, and the tied
    embeddings are 0 there but for EOS and padding. Whatever runs the model pays nothing for it.

    :param eos_hazard: probability of EOS at each token, about; 0: never.
    :param seed: of the weights.
    :param n_positions: the longest context that it can read.
    """
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(gpt2_config(n_positions=n_positions)).eval()
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = 0.0
        model.transformer.ln_f.bias[0] = 1.0
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 0.0
        embeddings[[eos, pad], 0] = NEVER
        if eos_hazard > 0:
            others = model(torch.randint(pad - 1, (16, 16))).logits.logsumexp(dim=-1).mean().item()
            embeddings[eos, 0] = others + math.log(eos_hazard / (1.0 - eos_hazard))
    return model


def tiny_gpt2(n_tokens: int, seed: int, n_positions: int = 128) -> GPT2LMHeadModel:
    """A random GPT-2 of one layer of width 32, which solves the probes; EOS and padding are its tokens 0 and 1.

    :param n_tokens: V, the number of tokens.
    :param seed: of the weights.
    :param n_positions: the longest context that it can read.
    """
    torch.manual_seed(seed)
    ids = {"eos_token_id": 0, "pad_token_id": 1}
    shape = {"vocab_size": n_tokens, "n_positions": n_positions, "n_embd": 32, "n_layer": 1, "n_head": 4}
    return GPT2LMHeadModel(gpt2_config(**shape, **ids, initializer_range=0.1)).eval()


def gpt2_classifier(seed: int) -> GPT2ForSequenceClassification:
    """A random reward or value model of the same size.

    :param seed: of the weights.
    """
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(gpt2_config(num_labels=1)).eval()


def hazard_for(mean: float, budget: int) -> float:
    """The constant EOS probability at which texts cut at ``budget`` tokens have a given mean length.

    Σ_{t<budget} (1 − p)^t = mean, solved by bisection.

    :param mean: tokens, EOS included.
    :param budget: tokens.
    """
    low, high = 1e-9, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** budget) / p > mean else (low, p)
    return (low + high) / 2


def words(directory: Path | None = None, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, made offline: text and tokens correspond one to one.

    :param directory: also saved there.
    :param vocabulary: how many words, EOS and padding included, which are the last two.
    """
    ids = {f"w{i}": i for i in range(vocabulary - 2)} | {"<eos>": vocabulary - 2, "<pad>": vocabulary - 1}
    core = Tokenizer(WordLevel(ids, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.padding_side = "left"
    if directory is not None:
        tokenizer.save_pretrained(directory)
    return tokenizer


def word_prompts(tokens: int = PROMPT_TOKENS, vocabulary: int = VOCABULARY) -> list[str]:
    """Texts of random words.

    :param tokens: how many words a text has.
    :param vocabulary: of the tokenizer.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary - 2, (N_PROMPTS, tokens), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in row) for row in ids]


def _exact_prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that a real tokenizer makes exactly ``PROMPT_TOKENS`` tokens of."""
    nouns = ["dog", "train", "river", "story", "house", "garden", "friend", "teacher", "day", "girl"]
    verbs = ["saw", "found", "liked", "took", "heard"]
    ends = ["and then it was a good day", "because of what the old man said to her", "and there was something more"]
    found = []
    for noun in nouns:
        for verb in verbs:
            for end in ends:
                ids = tokenizer(f"The little {noun} {verb} it {end}")["input_ids"][:PROMPT_TOKENS]
                text = tokenizer.decode(ids)
                if len(ids) == PROMPT_TOKENS and tokenizer(text)["input_ids"] == ids:
                    found.append(text)
    assert found, "no sentence fits this tokenizer"
    return found
