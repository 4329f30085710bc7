"""Where prompts come from, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

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
