"""Where prompts come from, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from text_env.env import TextEnv
from text_env.prompts import Prompts, load_prompts

ROWS = [{"prompt": "The movie", "answer": "a"}, {"prompt": "I loved, really", "answer": "b"}]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS), encoding="utf-8")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS), encoding="utf-8")


def write_gz(path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize(
    ("name", "write"),
    [("p.jsonl", write_jsonl), ("p.json", write_json), ("p.jsonl.gz", write_gz), ("p.csv", write_csv)],
)
def test_a_file_of_rows_gives_prompts_and_columns(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    assert load_prompts(tmp_path / name) == load_prompts(str(tmp_path / name)) == ROWS


def test_a_text_file_gives_a_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("The movie\n\n Naïve \r\n", encoding="utf-8")
    assert [row["prompt"] for row in load_prompts(tmp_path / "p.txt")] == ["The movie", " Naïve "]


class ArrowStream:
    """A table of a library that is not known by name, such as duckdb's or modin's."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return pyarrow.Table.from_pylist(ROWS).__arrow_c_stream__(requested_schema)


class LikePolars:
    columns = ("prompt", "answer")

    def __iter__(self) -> Any:
        return iter([["The movie", "I loved, really"], ["a", "b"]])  # a polars.DataFrame iterates over its columns

    def to_dicts(self) -> list[dict[str, str]]:
        return ROWS


COLUMNS = {name: [row[name] for row in ROWS] for name in ("prompt", "answer")}


@pytest.mark.parametrize(
    "table",
    [
        pandas.DataFrame(ROWS),
        pandas.DataFrame(ROWS, index=[7, 3]),
        pyarrow.Table.from_pylist(ROWS),
        pyarrow.RecordBatch.from_pylist(ROWS),
        ArrowStream(),
        LikePolars(),
        COLUMNS,
        {name: np.array(column) for name, column in COLUMNS.items()},
        {name: pandas.Series(column) for name, column in COLUMNS.items()},
        {name: tuple(column) for name, column in COLUMNS.items()},
        iter(ROWS),
    ],
    ids=lambda table: type(table).__name__,
)
def test_a_table_gives_its_rows_and_not_its_columns(table: Any) -> None:
    assert load_prompts(table) == ROWS


def test_what_a_data_frame_lacks_is_none_and_its_lists_are_lists(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    rows = [
        {"prompt": chat, "answer": "3", "level": 1, "steps": [1, 2]},
        {"prompt": chat, "answer": None, "level": None, "steps": None},
    ]
    frame = pandas.concat([pandas.DataFrame(rows[:1]), pandas.DataFrame([{"prompt": chat}])])  # a mixture of tasks
    assert load_prompts(frame) == rows
    assert load_prompts(dict(frame)) == rows
    assert load_prompts(frame.astype({"level": "Int64", "answer": "string"})) == rows
    frame.to_parquet(tmp_path / "prompts.parquet")
    assert load_prompts(pandas.read_parquet(tmp_path / "prompts.parquet")) == rows  # has arrays in place of the lists


@pytest.mark.parametrize("wrap", [pandas.Series, np.array, pyarrow.array, lambda texts: pyarrow.chunked_array([texts])])
def test_a_column_of_texts_gives_its_texts(wrap: Any) -> None:
    assert load_prompts(wrap(COLUMNS["prompt"])) == [{"prompt": prompt} for prompt in COLUMNS["prompt"]]


class UnknownTable:
    columns = ("prompt",)

    def __iter__(self) -> Any:
        return iter(["prompt"])


def test_what_has_no_rows_in_an_order_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("The movie\n")
    with (tmp_path / "p.txt").open() as file:
        for spec, message in [
            (file, "a file's path, a table or a list of rows, got TextIOWrapper"),
            ({"The movie", "I"}, "in an order, got builtins.set, whose order differs from process to process"),
            (b"The movie", "got bytes"),
            (UnknownTable(), r"UnknownTable, a table of an unknown kind: turn it into a list of mappings"),
            (pandas.DataFrame({"text": ["The movie"]}), "Expected prompt 0 to be a string or a mapping with a string"),
            ({"prompt": ["a", "b"], "answer": ["c"]}, "to columns of equal length"),
            ({"train": ROWS, "test": ROWS}, r"A data set with splits is given as one of them, data\['train'\]"),
        ]:
            with pytest.raises(ValueError, match=message):
                load_prompts(spec)


@pytest.mark.parametrize("column", ["self", "cls", 1, ("a", "b"), "log_metric", "trainer_state", "log_extra"])
def test_a_column_that_can_be_no_keyword_of_a_reward_is_refused_at_once(column: Any) -> None:
    with pytest.raises(ValueError, match=r"Prompt 1 has the column .*: rename it"):
        load_prompts([{"prompt": "The movie"}, {"prompt": "I", column: 3}])


def test_a_csv_row_with_more_fields_than_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,answer\nThe movie,a\nI loved, really,b\n")
    with pytest.raises(ValueError, match=r"Expected prompt 1 to have a value for each column, got more: \['b'\]"):
        load_prompts(tmp_path / "p.csv")


@pytest.mark.parametrize("prompt", ["ok \ud800", [{"role": "user", "content": "\udc00"}], {"prompt": "\ud83d"}])
def test_a_prompt_with_half_of_a_surrogate_pair_is_named_by_its_number(prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected prompt 2 to be Unicode text, got .* half of a surrogate pair at"):
        load_prompts(["a", "b", prompt])


def test_a_datasets_dataset_is_taken_as_it_is() -> None:
    datasets = pytest.importorskip("datasets")
    assert load_prompts(datasets.Dataset.from_list(ROWS)) == ROWS


def test_a_function_by_name_is_called_also_from_the_working_directory(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "my_prompts_module.py").write_text("def load():\n    return ['The movie']\n")
    monkeypatch.chdir(tmp_path)
    assert load_prompts("my_prompts_module:load") == [{"prompt": "The movie"}]


def test_the_builtin_splits_are_disjoint_and_the_training_split_is_the_default() -> None:
    train, held_out = load_prompts("builtin"), load_prompts("builtin:eval")
    assert train == load_prompts("builtin:train")
    assert len(train) >= 100
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "at least one prompt"),
        ([" ok", ""], "a prompt of at least one token"),
        (["ok", 3], "Expected prompt 1 to be a string or a mapping"),
        ([{"text": "ok"}], "Expected prompt 0 to be a string or a mapping with a string 'prompt'"),
        ([{"prompt": [{"role": "user", "text": "hi"}]}], "a mapping with a string 'prompt'"),
        ([{"prompt": [{"role": "user", "content": "hi"}]}], "Expected a tokenizer with a chat template"),
        (["ok", [{"role": "user", "content": "hi"}]], "either all strings or all lists of messages"),
        ([{"prompt": "ok", "completions": 1}], "column 'completions', which rewards are given already"),
        (["a prompt of more tokens than there is room for"], "at most max_prompt_tokens=8 tokens, got"),
        ({"prompt": "ok"}, "gives dict"),
        (3, "gives int"),
        ("bultin", "Unknown prompts 'bultin'. Known names: builtin, builtin:train, builtin:eval"),
        ("missing.jsonl", "there is no file 'missing.jsonl'"),
        ("missing.txt.gz", "there is no file 'missing.txt.gz'"),
        ("no_such_module:load", "there is no module 'no_such_module'"),
        ("json:no_such_function", "has no 'no_such_function'"),
    ],
)
def test_what_cannot_be_prompts_is_refused_with_what_was_expected(tokenizer: Any, spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompts(spec, tokenizer, max_prompt_tokens=8)


@pytest.mark.parametrize("content", [b'{"prompt": ', b"\xff\xfe\x00"])
def test_a_malformed_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.jsonl' to be a well-formed \.jsonl file"):
        load_prompts(tmp_path / "broken.jsonl")


def test_an_error_inside_a_users_module_is_passed_on_as_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "my_broken_module.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_prompts("my_broken_module:load")


def test_an_overlong_prompt_keeps_its_last_tokens_when_truncation_is_asked_for(tokenizer: Any) -> None:
    text = "The movie was good and the music was good"
    prompts = Prompts([text, "The"], tokenizer, 4, "truncate_left")
    assert prompts[0].token_ids == tokenizer(text)["input_ids"][-4:]
    assert prompts[0].text == prompts[0].decoded == tokenizer.decode(prompts[0].token_ids)
    assert prompts[1].text == "The"


def test_a_row_without_a_column_that_others_have_has_none_there(tokenizer: Any) -> None:
    prompts = Prompts([{"prompt": "The", "a": 1}, {"prompt": "movie", "b": 2}], tokenizer, 8)
    assert [dict(prompt.columns) for prompt in prompts] == [{"a": 1, "b": None}, {"a": None, "b": 2}]
    assert dict(prompts.make("I").columns) == {"a": None, "b": None}


# The end of a prompt


def ending_tokenizer(template: str, eos: str = "[SEP]", bos: str | None = None) -> PreTrainedTokenizerFast:
    """Whole words, and special tokens around them as the template says."""
    words = ["[CLS]", "[SEP]", "[EOS]", "[UNK]", "The", "movie"]
    ids = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, ids[word]) for word in ("[CLS]", "[SEP]", "[EOS]")]
    inner.post_processor = processors.TemplateProcessing(template, None, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, bos_token=bos, unk_token="[UNK]", extra_special_tokens=["[CLS]", "[SEP]"]
    )


@pytest.mark.parametrize(
    ("template", "eos", "kept"),
    [
        ("$A [SEP]", "[SEP]", [4, 5]),
        ("[CLS] $A [SEP]", "[SEP]", [0, 4, 5]),
        ("[CLS] $A [SEP]", "[EOS]", [0, 4, 5]),
        ("[CLS] $A [SEP] [EOS]", "[EOS]", [0, 4, 5]),
        ("[CLS] $A [EOS] [SEP]", "[EOS]", [0, 4, 5]),
        ("[SEP] $A", "[SEP]", [1, 4, 5]),
        ("$A", "[SEP]", [4, 5]),
    ],
)
def test_a_prompt_never_ends_in_what_a_tokenizer_appends(template: str, eos: str, kept: list[int]) -> None:
    tokenizer = ending_tokenizer(template, eos)
    prompts = Prompts(["The movie", f"The movie {eos} {eos}"], tokenizer, 8)
    assert [prompt.token_ids for prompt in prompts] == [kept, kept]
    assert [prompt.text.strip() for prompt in prompts] == ["The movie"] * 2
    assert prompts.make("The movie").token_ids == kept
    assert prompts.make([4, 5, tokenizer.eos_token_id, tokenizer.eos_token_id]).token_ids == [4, 5]
    env = TextEnv(tokenizer=tokenizer, prompts=["The movie"], reward=len, max_prompt_tokens=8)
    for given in ("The movie", [*kept, tokenizer.eos_token_id]):
        observation, _ = env.reset(options={"prompt": given})
        assert observation["input_ids"][: observation["prompt_length"][0]].tolist() == kept


@pytest.mark.parametrize("prompt", ["[SEP]", "[SEP] [SEP]", [1], [1, 1]])
def test_a_prompt_of_nothing_but_ends_is_empty(prompt: Any) -> None:
    prompts = Prompts(["The"], ending_tokenizer("[CLS] $A [SEP]"), 8)
    with pytest.raises(ValueError, match="Expected a prompt of at least one token"):
        prompts.make(prompt)


def test_a_lone_bos_begins_a_text_although_it_is_eos_as_well() -> None:
    prompts = Prompts(["The"], ending_tokenizer("$A", bos="[SEP]"), 8)
    assert prompts.make([1]).token_ids == prompts.make([1, 1]).token_ids == [1]


def test_a_cut_prompt_keeps_its_last_words_and_not_the_end_behind_them() -> None:
    prompts = Prompts(["The The movie"], ending_tokenizer("[CLS] $A [SEP]"), 2, "truncate_left")
    assert prompts[0].token_ids == [4, 5]


def test_a_chat_templates_last_eos_is_dropped() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    prompts = Prompts(["The movie"], tokenizer, 64)
    assert tokenizer.decode(prompts[0].token_ids) == "[user]The movie"
    assert tokenizer.decode(prompts.make([{"role": "user", "content": "I"}] * 2).token_ids) == "[user]I<eos>[user]I"
