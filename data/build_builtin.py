"""Build the language model, prompts, preference pairs and reward model that ship in ``text_env/builtin``.

Two commands::

    python data/build_builtin.py clean --raw RAW.jsonl.gz      # the raw corpus -> data/reviews.jsonl.gz
    python data/build_builtin.py build                         # the cleaned corpus -> text_env/builtin

``build`` runs six stages in order: ``tokenizer``, ``language_model``, ``prompts``, ``preferences``,
``reward_model``, ``report``. Each reads what the earlier ones left in ``--out`` and notes its figures in
``report.json`` there, so any of them can be run again by itself: ``build --stages reward_model report``.
Everything is a setting of :class:`Build`; ``tests/text_env/test_builtin.py`` rebuilds a miniature with small ones.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is built here; nothing is to be fetched

import numpy as np
import torch
import transformers
import tyro
from torch import Tensor

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "reviews.jsonl.gz"
BUILTIN = HERE.parent / "text_env" / "builtin"

PAD, EOS = "<pad>", "<eos>"
HOLD_OUT_EVERY = 32  # reviews 0, 32, 64, ... of the cleaned corpus are never trained on

Record = dict[str, Any]
Stage = Literal["tokenizer", "language_model", "prompts", "preferences", "reward_model", "report"]
STAGES: tuple[Stage, ...] = (
    "tokenizer",
    "language_model",
    "prompts",
    "preferences",
    "reward_model",
    "report",
)


@dataclass
class Clean:
    """Clean the raw corpus."""

    raw: Path
    """The raw reviews, gzipped JSON lines with text, opening, genre, sentiment."""
    corpus: Path = CORPUS
    """Where the cleaned reviews go."""


@dataclass
class Build:
    """Build the tokenizer, models, prompts and pairs from the cleaned corpus."""

    corpus: Path = CORPUS
    """The cleaned reviews."""
    out: Path = BUILTIN
    """The directory that is written."""
    stages: tuple[Stage, ...] = STAGES
    """Which stages to run, always in the order above."""
    seed: int = 0
    threads: int = 2
    """Torch threads; figures are repeatable for one number of threads on one kind of processor."""
    n_reviews: int | None = None
    """Use only the first so many reviews."""

    vocab_size: int = 2048
    """Entries of the tokenizer, the two special ones included."""
    hidden_size: int = 192
    n_layers: int = 4
    n_heads: int = 4
    intermediate_size: int = 512
    epochs: int = 6
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    batch_tokens: int = 4096
    compile: bool = True
    """Compile the model for training; needs a C++ compiler, saves a third of the time."""

    n_prompts: int = 160
    """Training prompts."""
    n_eval_prompts: int = 64
    """Held-out prompts, none of which is a training prompt."""

    n_pairs: int = 20_000
    """Training pairs, on training prompts."""
    n_eval_pairs: int = 1_000
    """Held-out pairs, on held-out prompts."""
    steered_share: float = 1 / 3
    """The share of the texts in the pairs that were sampled with lexicon words made more or less likely."""
    max_new_tokens: int = 48
    annotator_ceiling: float = 0.85
    """The accuracy of the best possible predictor of the simulated annotator."""

    reward_epochs: float = 1.0
    reward_learning_rate: float = 5e-4
    reward_batch_pairs: int = 32
    n_normalisation_texts: int = 4_096
    """Samples of the untrained policy that set the reward model's mean and standard deviation."""


# --------------------------------------------------------------------------------------- reading and writing


def read_jsonl(path: Path) -> list[Record]:
    """Read a JSON-lines file.

    :param path: the file, gzipped if its name ends in ``.gz``
    :return: one dictionary a line
    """
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write a JSON-lines file; the same records give the same bytes.

    :param path: the file, gzipped if its name ends in ``.gz``
    :param records: one dictionary a line
    """
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without mtime=0, gzip writes the time of day into its header.
    path.write_bytes(gzip.compress(data, compresslevel=9, mtime=0) if path.suffix == ".gz" else data)


def note(out: Path, stage: str, figures: Record) -> None:
    """Put the figures of a stage into ``report.json``.

    :param out: the directory that is built
    :param stage: the stage's name, the key under which the figures stand
    :param figures: JSON-able figures
    """
    path = out / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report[stage] = figures
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{stage}: {json.dumps(figures)}", flush=True)


# -------------------------------------------------------------------------------------------------- cleaning

CHARACTERS = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})
MARKDOWN = re.compile(r"(\*\*|__)(\S(?:.*?\S)?)\1|(?<!\w)[*_](\S(?:[^*_]*?\S)?)[*_](?!\w)|^\s*(?:#+|[-*•]|\d+\.)\s+")
LEFTOVER = re.compile(r"[*_`#|<>\[\]{}~^\\]|https?:|[^\x20-\x7e\xa1-\xff]")
# The writer spoke of itself, of its task or to whoever gave it.
ASSISTANT_TALK = re.compile(
    r"language model|\bas an? (?:AI|artificial)\b|\bAI (?:assistant|model|language)"
    r"|\bI(?:'m| am) an? (?:AI|assistant)\b|\b(?:virtual|digital|writing) assistant|chatbot"
    r"|happy to (?:help|assist|write)|here to help|can i help|help you with"
    r"|i'm sorry,? but|i am sorry,? but|\bi(?:'m| am) unable to"
    r"|i can(?:not|'t) (?:provide|fulfil|write|assist)"
    r"|i don't have (?:personal|access|any personal|the exact|enough information)"
    r"|(?:want|like) me to (?:write|review|help)|answer your|feel free to|let me know if|rewritten|rewrite"
    r"|\byour (?:request|review|question|prompt|essay|text|draft)\b"
    r"|here(?:'s| is) (?:a|an|my|the|your|some)\b"
    r"|(?:movie|film|short|brief|this|my|the|first-person|critical) review\b"
    r"|bored and annoyed|first-person|word (?:count|limit)|\bnote:|\bdialogue:|\breview:",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?][\"')]*(?=\s|$)")
ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof|Capt|Lt|Sgt|vs|etc|No)|\b[A-Z]|\.\.)\.$")


def finished(text: str) -> str:
    """Cut a text after its last finished sentence.

    :param text: a text that may stop anywhere
    :return: the text up to its last sentence end with every double quote closed, or ``""`` if there is none
    """
    for end in reversed([match.end() for match in SENTENCE_END.finditer(text)]):
        if text.count('"', 0, end) % 2 == 0 and not ABBREVIATION.search(text[:end]):
            return text[:end]
    return ""


def is_repetitive(text: str) -> bool:
    """Tell whether a text goes round in circles ("and no imagination and no imagination ...").

    :param text: a text
    :return: whether more than three tenths of its three-word sequences were there before
    """
    words = text.lower().split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return bool(triples) and len(set(triples)) < 0.7 * len(triples)


def clean_text(text: str, opening: str) -> str | None:
    """Clean one review.

    :param text: the raw review
    :param opening: the words that it was made to start with
    :return: the cleaned review, or None if it is to be dropped
    """
    text = unicodedata.normalize("NFC", text).translate(CHARACTERS)
    text = MARKDOWN.sub(lambda match: match[2] or match[3] or "", text)
    text = finished(" ".join(text.split()))
    if LEFTOVER.search(text) or ASSISTANT_TALK.search(text) or is_repetitive(text):
        return None
    enough = len(text.split()) >= max(8, len(opening.split()) + 4)
    return text if enough and text.startswith(opening) else None


def clean(config: Clean) -> None:
    """Write the cleaned corpus.

    :param config: where from and where to
    """
    raw = read_jsonl(config.raw)
    reviews: dict[str, Record] = {}  # keyed by the text in lower case, which drops duplicates and keeps the order
    for record in raw:
        text = clean_text(record["text"], record["opening"])
        if text is not None:
            fields = {key: record[key] for key in ("opening", "genre", "sentiment")}
            reviews.setdefault(text.lower(), {"text": text, **fields})
    write_jsonl(config.corpus, reviews.values())
    print(f"{len(raw)} raw reviews, {len(reviews)} kept, {config.corpus.stat().st_size / 1e6:.2f} MB")


def load_corpus(path: Path, n_reviews: int | None = None) -> tuple[list[Record], list[Record]]:
    """Read the cleaned corpus.

    :param path: the cleaned corpus
    :param n_reviews: only the first so many
    :return: the reviews for training, the held-out reviews
    """
    reviews = read_jsonl(path)[:n_reviews]
    held_out = reviews[::HOLD_OUT_EVERY]
    return [review for i, review in enumerate(reviews) if i % HOLD_OUT_EVERY], held_out


# ------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(config: Build) -> Record:
    """Train the byte-level BPE tokenizer on the training reviews.

    :param config: the settings
    :return: figures for the report
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    train, _ = load_corpus(config.corpus, config.n_reviews)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[AddedToken(PAD, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: nothing is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator([review["text"] for review in train], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="right",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(config.out / "language_model")
    n_tokens = sum(map(len, fast([review["text"] for review in train])["input_ids"]))
    n_characters = sum(len(review["text"]) for review in train)
    return {"entries": len(fast), "train_tokens": n_tokens, "characters_per_token": n_characters / n_tokens}


# -------------------------------------------------------------------------------------------- language model


def batches_of_tokens(lengths: list[int], batch_tokens: int, rng: np.random.Generator | None) -> Iterator[list[int]]:
    """Group sequences of similar length, so that hardly anything is padding.

    :param lengths: the length of each sequence
    :param batch_tokens: the most tokens in one batch, padding included
    :param rng: shuffles sequences of equal length and the batches; None leaves them sorted
    :return: an iterator over lists of sequence numbers
    """
    noise = rng.random(len(lengths)) if rng is not None else np.zeros(len(lengths))
    order = np.argsort(np.asarray(lengths) + noise, kind="stable")
    batches: list[list[int]] = [[]]
    for i in order.tolist():
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    if rng is not None:
        rng.shuffle(batches)
    yield from batches


def pad_right(sequences: list[list[int]], value: int) -> Tensor:
    """Make a rectangle of sequences.

    :param sequences: token ids
    :param value: what fills the short ones up
    :return: int64, (number of sequences, longest length)
    """
    rows = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def next_token_losses(model: Any, sequences: list[list[int]]) -> Tensor:
    """Negative log-likelihood of every token after the first.

    :param model: a causal language model
    :param sequences: token ids, each sequence its own context
    :return: nats, one entry for each real token
    """
    # Right padding is invisible to the real tokens of a causal model: no attention mask is needed.
    ids = pad_right(sequences, value=-100)  # (B, T)
    real = ids[:, 1:] != -100
    hidden = model.model(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).last_hidden_state[real]  # (N, H)
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][real], reduction="none")


@torch.no_grad()
def nats_per_token(model: Any, sequences: list[list[int]]) -> float:
    """Mean negative log-likelihood over all tokens after the first of each sequence.

    :param model: a causal language model
    :param sequences: token ids with the eos that ends them
    :return: nats per token
    """
    model.eval()
    batches = batches_of_tokens([len(sequence) for sequence in sequences], 8192, rng=None)
    return torch.cat([next_token_losses(model, [sequences[i] for i in batch]) for batch in batches]).mean().item()


def tokenize(tokenizer: Any, reviews: list[Record]) -> list[list[int]]:
    """Turn reviews into training sequences.

    :param tokenizer: the tokenizer
    :param reviews: records with a text
    :return: token ids, eos at the end
    """
    ids = tokenizer([review["text"] for review in reviews])["input_ids"]
    return [[*sequence[:255], tokenizer.eos_token_id] for sequence in ids]


def fit(
    model: Any,
    batches: Iterable[list[list[int]]],
    n_batches: int,
    losses_of: Callable[[Any, list[list[int]]], Tensor],
    learning_rate: float,
    weight_decay: float,
    compile_decoder: bool,
) -> None:
    """Train a language model: AdamW, a short warm-up, half a cosine wave, matrix products in bfloat16.

    :param model: a Hugging Face causal language model
    :param batches: lists of sequences of token ids
    :param n_batches: how many of them there are
    :param losses_of: called with the model and a batch; the losses of the tokens that count, 1-D
    :param learning_rate: the highest learning rate
    :param weight_decay: of matrices only
    :param compile_decoder: whether to compile the decoder, which needs a C++ compiler
    """
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": gains, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
    )
    warmup = max(1, min(100, n_batches // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / n_batches))),
    )
    if compile_decoder:
        model.model.compile(dynamic=True)
    n_tokens, start = 0, time.perf_counter()
    model.train()
    for step, batch in zip(range(n_batches), batches, strict=False):  # batches may be endless
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = losses_of(model, batch)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        n_tokens += len(losses)
        if step % 100 == 0 or step == n_batches - 1:
            speed = n_tokens / (time.perf_counter() - start)
            print(
                f"step {step}/{n_batches}  loss {losses.mean().item():.4f}  {speed:,.0f} tokens/s",
                flush=True,
            )


def set_generation(model: Any, tokenizer: Any) -> None:
    """Let ``model.generate`` sample from the model itself, not from a nucleus of it.

    :param model: a Hugging Face causal language model
    :param tokenizer: its tokenizer
    """
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,  # 0 and 1.0 say "off"
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_fp16(model: Any, path: Path) -> None:
    """Save a model with half-precision weights that loads as float32 unless told otherwise.

    :param model: a Hugging Face model; its weights are rounded in place
    :param path: the directory
    """
    model.half().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    # Half precision is for the disk only: CPUs are slow in it, and sums of log-probabilities want float32.
    config["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_language_model(config: Build) -> Record:
    """Train the language model; each review is a sequence of its own, ended by eos.

    :param config: the settings
    :return: figures for the report
    """
    path = config.out / "language_model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    train, held_out = (tokenize(tokenizer, part) for part in load_corpus(config.corpus, config.n_reviews))
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rng = np.random.default_rng(config.seed)
    lengths = [len(sequence) for sequence in train]
    batches = [batch for _ in range(config.epochs) for batch in batches_of_tokens(lengths, config.batch_tokens, rng)]
    sequences = ([train[i] for i in batch] for batch in batches)
    fit(model, sequences, len(batches), next_token_losses, config.learning_rate, config.weight_decay, config.compile)
    set_generation(model, tokenizer)
    save_fp16(model, path)
    shipped = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "train_reviews": len(train),
        "held_out_reviews": len(held_out),
        "held_out_nats_per_token": nats_per_token(shipped, held_out),
        "train_nats_per_token": nats_per_token(shipped, train[: len(held_out)]),
        "tokens_per_epoch": sum(lengths) - len(lengths),
        "epochs": config.epochs,
    }


# --------------------------------------------------------------------------------------------------- prompts

# Words that vaderSentiment treats apart from its lists, and a few that promise a contrast.
TURNING_WORDS = {"but", "despite", "least", "without", "like", "no", "not", "too", "never", "lack", "only"}


@cache
def analyzer() -> Any:
    """The lexicon's analyzer, loaded once.

    :return: a SentimentIntensityAnalyzer
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def is_neutral(prompt: str) -> bool:
    """Tell whether a prompt leaves the sentiment of what follows open.

    :param prompt: the first words of a review
    :return: whether it holds no word of the lexicon, no negation, no word that makes the next one count more
    """
    from vaderSentiment.vaderSentiment import BOOSTER_DICT, NEGATE

    # Word by word: a text may also score 0 because a good word and a bad one cancel out.
    return not any(
        word in analyzer().lexicon
        or word in NEGATE
        or word in BOOSTER_DICT
        or word in TURNING_WORDS
        or word.endswith("n't")
        for word in re.findall(r"[a-z']+", prompt.lower())
    )


def build_prompts(config: Build) -> Record:
    """Choose prompts: the openings of the training reviews and their most frequent longer first words.

    :param config: the settings
    :return: figures for the report
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.out / "language_model")
    train, _ = load_corpus(config.corpus, config.n_reviews)
    counts: dict[str, Counter[str]] = {}
    for review in train:
        words = review["text"].split()
        beginnings = {" ".join(words[:k]) for k in range(2, 7)}
        counts.setdefault(review["opening"], Counter()).update(
            sorted(start for start in beginnings if start.startswith(review["opening"]))
        )
    ranked = [
        [
            prompt
            for prompt, n in sorted(counts[opening].items(), key=lambda item: (-item[1], item[0]))
            if n >= 3 and re.fullmatch(r"[A-Za-z',\- ]*[a-z]|.* I", prompt) and is_neutral(prompt)
        ]
        for opening in sorted(counts)
    ]
    # The most frequent of each opening, then the second most frequent of each, ...: no opening dominates.
    depth = max(map(len, ranked))
    chosen = [prompts[rank] for rank in range(depth) for prompts in ranked if rank < len(prompts)]
    chosen = [prompt for prompt in chosen if len(tokenizer(prompt)["input_ids"]) <= 12]
    n_all = config.n_prompts + config.n_eval_prompts
    if len(chosen) < n_all:
        raise ValueError(f"the corpus yields {len(chosen)} prompts, but {n_all} were asked for: use more reviews")
    shuffled = np.random.default_rng(config.seed).permutation(chosen[:n_all]).tolist()
    splits = ["train"] * config.n_prompts + ["eval"] * config.n_eval_prompts
    records = [{"prompt": prompt, "split": split} for prompt, split in zip(shuffled, splits, strict=True)]
    write_jsonl(config.out / "prompts.jsonl", records)
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in shuffled)
    return {"train": config.n_prompts, "eval": config.n_eval_prompts, "longest_in_tokens": longest}


def load_prompts(out: Path, split: str) -> list[str]:
    """Read prompts of the directory that is built.

    :param out: the directory
    :param split: ``"train"`` or ``"eval"``
    :return: the prompts
    """
    return [record["prompt"] for record in read_jsonl(out / "prompts.jsonl") if record["split"] == split]


# ------------------------------------------------------------------------------------------ preference pairs


def lexicon_scores(texts: list[str]) -> np.ndarray:
    """The gold score: the compound sentiment of the vaderSentiment lexicon.

    :param texts: finished texts, prompt included
    :return: float64, between -1 and 1
    """
    return np.array([analyzer().polarity_scores(text)["compound"] for text in texts])


def lexicon_valences(tokenizer: Any) -> Tensor:
    """The lexicon's valence of every token that is a whole word.

    :param tokenizer: the tokenizer
    :return: float32, (V,), about -4 to 4, 0 for tokens that are no word of the lexicon
    """
    lexicon = analyzer().lexicon
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    return torch.tensor([lexicon.get(word[1:], 0.0) if word.startswith(" ") else 0.0 for word in words])


class Steer(transformers.LogitsProcessor):
    """Adds a multiple of the lexicon's valences to the logits, a different one in each row."""

    def __init__(self, strengths: Tensor, valences: Tensor) -> None:
        """Remember what to add.

        :param strengths: (B,) one multiple for each row
        :param valences: (V,) what :func:`lexicon_valences` gives
        """
        self.bonus = strengths[:, None] * valences  # (B, V)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add the bonus.

        :param input_ids: unused
        :param scores: logits (B, V)
        :return: logits (B, V)
        """
        return scores + self.bonus


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, strengths: np.ndarray | None = None
) -> list[str]:
    """Sample one completion for each prompt at temperature 1 from the whole distribution.

    :param model: the language model
    :param tokenizer: its tokenizer
    :param prompts: the prompts
    :param max_new_tokens: the response budget
    :param strengths: how much each completion is steered, see :class:`Steer`; None for not at all
    :return: the completions, without special tokens
    """
    model.eval()
    valences = lexicon_valences(tokenizer)
    completions: list[str] = []
    for start in range(0, len(prompts), 256):
        batch = tokenizer(prompts[start : start + 256], padding=True, padding_side="left", return_tensors="pt")
        processors = transformers.LogitsProcessorList()
        if strengths is not None:
            processors.append(Steer(torch.tensor(strengths[start : start + 256], dtype=torch.float32), valences))
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_processor=processors,
            max_new_tokens=max_new_tokens,
        )
        responses = ids[:, batch["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(responses, skip_special_tokens=True)
    return completions


def preference_probabilities(differences: np.ndarray, scale: float) -> np.ndarray:
    """The simulated annotator: the better text is preferred, up to logistic noise.

    :param differences: the gold score of text a less that of text b
    :param scale: the scale of the logistic noise
    :return: the probability that a is preferred
    """
    return np.asarray(1 / (1 + np.exp(-differences / scale)))


def ceiling(differences: np.ndarray, scale: float) -> float:
    """The accuracy of a predictor that knows the annotator's probabilities, on average over the noise.

    :param differences: gold score differences of pairs
    :param scale: the scale of the logistic noise
    :return: mean of max(p, 1 - p)
    """
    return float(preference_probabilities(np.abs(differences), scale).mean())


def scale_for_ceiling(differences: np.ndarray, accuracy: float) -> float:
    """The noise at which the best possible accuracy is the one asked for.

    :param differences: gold score differences of pairs
    :param accuracy: the ceiling that is wanted
    :return: the scale of the logistic noise
    """
    low, high = 1e-3, 1e3
    for _ in range(60):  # the ceiling falls with the scale: bisection
        middle = math.sqrt(low * high)
        low, high = (middle, high) if ceiling(differences, middle) > accuracy else (low, middle)
    return low


def build_preferences(config: Build) -> Record:
    """Sample two texts for a prompt, again and again, and have the simulated annotator choose.

    :param config: the settings
    :return: figures for the report
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.out / "language_model")
    model = transformers.AutoModelForCausalLM.from_pretrained(config.out / "language_model", dtype=torch.float32)
    rng = np.random.default_rng(config.seed)
    figures: Record = {"steered_share": config.steered_share}
    records: list[Record] = []
    for split, n_pairs in (("train", config.n_pairs), ("eval", config.n_eval_pairs)):
        prompts = load_prompts(config.out, split)
        prompts = [prompts[i % len(prompts)] for i in range(n_pairs)]
        # A reward model that has seen only the untrained policy's texts is a poor judge of a policy that PPO
        # has moved. So some texts are sampled with the lexicon's words more likely, or less.
        strengths = rng.uniform(-0.6, 0.6, size=(2, n_pairs))
        strengths[rng.random((2, n_pairs)) >= config.steered_share] = 0.0
        # a and b of a pair stand in one batch, so that the two halves differ in nothing but chance.
        texts = sample(
            model,
            tokenizer,
            [p for p in prompts for _ in "ab"],
            config.max_new_tokens,
            strengths.T.reshape(-1),
        )
        first, second = texts[::2], texts[1::2]
        scores_a, scores_b = (
            lexicon_scores([p + text for p, text in zip(prompts, half, strict=True)]) for half in (first, second)
        )
        differences = scores_a - scores_b
        if split == "train":
            figures["scale"] = scale_for_ceiling(differences, config.annotator_ceiling)
        prefers_a = rng.random(n_pairs) < preference_probabilities(differences, figures["scale"])
        for prompt, a, b, a_wins in zip(prompts, first, second, prefers_a.tolist(), strict=True):
            if a != b:
                chosen, rejected = (a, b) if a_wins else (b, a)
                records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split})
        figures[split] = {
            "pairs": sum(record["split"] == split for record in records),
            "annotator_ceiling": ceiling(differences, figures["scale"]),
            "annotator_agrees_with_lexicon": float(((differences > 0) == prefers_a)[differences != 0].mean()),
            "lexicon_mean": float(np.concatenate([scores_a, scores_b]).mean()),
        }
    write_jsonl(config.out / "preferences.jsonl.gz", records)
    return figures


# ---------------------------------------------------------------------------------------------- reward model


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs.

    :param values: numbers
    :return: float64, the same shape
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])


def build_reward_model(config: Build) -> Record:
    """Train the reward model on the pairs as ``textrlhf reward-model`` does, and keep what a reward needs of it.

    :param config: the settings
    :return: figures for the report
    """
    from agents.reward_models.train import RewardModelConfig, train_reward_model
    from text_env.rewards import SequenceClassifierReward

    path = config.out / "reward_model"
    with tempfile.TemporaryDirectory() as scratch:
        trained = Path(scratch) / "reward_model"
        report = train_reward_model(
            RewardModelConfig(
                preferences=str(config.out / "preferences.jsonl.gz"),
                base=str(config.out / "language_model"),
                out=trained,
                epochs=config.reward_epochs,
                learning_rate=config.reward_learning_rate,
                batch_size=config.reward_batch_pairs,
                save_dtype="float16",
                device="cpu",
                seed=config.seed,
                n_normalisation_texts=config.n_normalisation_texts,
                max_new_tokens=config.max_new_tokens,
            )
        )
        path.mkdir(parents=True, exist_ok=True)
        for file in trained.iterdir():
            # Plots and figures of the training, with this machine's paths in them, don't ship.
            if file.suffix in {".json", ".safetensors"} and file.name != "reward_model.json":
                shutil.copy(file, path)

    tokenizer = transformers.AutoTokenizer.from_pretrained(config.out / "language_model")
    policy = transformers.AutoModelForCausalLM.from_pretrained(config.out / "language_model", dtype=torch.float32)
    eval_prompts = load_prompts(config.out, "eval")
    prompts = [eval_prompts[i % len(eval_prompts)] for i in range(config.n_normalisation_texts)]
    completions = sample(policy, tokenizer, prompts, config.max_new_tokens)
    proxy = np.array(SequenceClassifierReward(path, device="cpu")(prompts=prompts, completions=completions))
    gold = lexicon_scores([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
    # Best of 16 by the reward model: does the lexicon follow where the reward model is pushed?
    groups = [range(start, len(prompts), len(eval_prompts))[:16] for start in range(len(eval_prompts))]
    best = [max(group, key=lambda i: proxy[i]) for group in groups]
    return {
        "parameters": report["parameters"],
        "train_accuracy": report["train"]["accuracy"],
        "held_out_accuracy": report["held_out"]["accuracy"],
        "reward_mean": report["normalisation"]["mean"],
        "reward_std": report["normalisation"]["std"],
        "held_out_prompts": {
            "pearson": float(np.corrcoef(proxy, gold)[0, 1]),
            "spearman": float(np.corrcoef(ranks(proxy), ranks(gold))[0, 1]),
            "score": float(proxy.mean()),
            "gold_score": float(gold.mean()),
            "best_of_16_score": float(proxy[best].mean()),
            "best_of_16_gold_score": float(gold[best].mean()),
        },
    }


# ---------------------------------------------------------------------------------------------------- report


def build_report(config: Build) -> Record:
    """Note what everything was made with.

    :param config: the settings
    :return: figures for the report
    """
    packages = ("torch", "transformers", "tokenizers", "trl", "datasets", "vaderSentiment", "numpy")
    settings = {key: value for key, value in vars(config).items() if not isinstance(value, Path | tuple)}
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    return {
        "settings": settings,
        "versions": {package: version(package) for package in packages},
        "megabytes": round(size / 1e6, 2),
    }


# ------------------------------------------------------------------------------------------------------ main


def build(config: Build) -> None:
    """Run the stages that were asked for.

    :param config: the settings
    """
    torch.set_num_threads(config.threads)
    stages: dict[Stage, Callable[[Build], Record]] = {
        "tokenizer": build_tokenizer,
        "language_model": build_language_model,
        "prompts": build_prompts,
        "preferences": build_preferences,
        "reward_model": build_reward_model,
        "report": build_report,
    }
    for name in STAGES:
        if name in config.stages:
            transformers.set_seed(config.seed)
            start = time.perf_counter()
            figures = stages[name](config)
            note(config.out, name, {**figures, "seconds": round(time.perf_counter() - start, 1)})


if __name__ == "__main__":
    arguments = tyro.extras.subcommand_cli_from_dict({"clean": Clean, "build": Build})
    clean(arguments) if isinstance(arguments, Clean) else build(arguments)
