"""Where preferences come from, what is malformed, and who is held out."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest

from text_env.preferences import Preference, load_preferences, parse_preference
from text_env.prompts import load_prompts

ROWS = [{"prompt": f"Prompt {i},", "chosen": f' gut\n"{i}", naïve', "rejected": f" bad {i}"} for i in range(40)]
PAIRS = [Preference(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHATS = [
    {"prompt": [user(f"Question {i}")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
    for i in range(40)
]


def every_pair(spec: Any, **kwargs: Any) -> list[Preference]:
    read = load_preferences(spec, **kwargs)
    return sorted([*read.train, *read.held_out], key=str)


# ---- sources -------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # with the mark that spreadsheets write
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def gzipped(write: Callable[[Path, list[dict[str, Any]]], None]) -> Callable[[Path, list[dict[str, Any]]], None]:
    def write_gzipped(path: Path, rows: list[dict[str, Any]]) -> None:
        plain = path.with_suffix("")
        write(plain, rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))

    return write_gzipped


FILES = {
    "pairs.jsonl": write_jsonl,
    "pairs.json": write_json,
    "pairs.csv": write_csv,
    "pairs.parquet": write_parquet,
    "pairs.jsonl.gz": gzipped(write_jsonl),
    "pairs.json.gz": gzipped(write_json),
    "pairs.csv.gz": gzipped(write_csv),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name, ROWS)
    assert every_pair(tmp_path / name) == every_pair(str(tmp_path / name)) == sorted(PAIRS, key=str)


@pytest.mark.parametrize("name", [name for name in FILES if "csv" not in name])
def test_conversations_come_from_every_kind_of_file_that_can_hold_them(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name, CHATS)
    expected = [Preference(chat["prompt"], "Yes.", "No.") for chat in CHATS]
    assert every_pair(tmp_path / name) == sorted(expected, key=str)
    assert load_preferences(tmp_path / name).conversational


def test_prompts_come_from_parquet_too(tmp_path: Path) -> None:
    write_parquet(tmp_path / "prompts.parquet", [{"prompt": "The movie"}, {"prompt": "I"}])
    assert load_prompts(tmp_path / "prompts.parquet") == [{"prompt": "The movie"}, {"prompt": "I"}]


def test_a_dataset_is_taken_live_and_from_the_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert every_pair(dataset) == every_pair(tmp_path / "saved") == every_pair(ROWS) == sorted(PAIRS, key=str)


def test_the_splits_of_a_dataset_dict_are_respected_live_and_from_the_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": ROWS[:30], "validation": ROWS[30:35], "test": ROWS[35:]}
    both = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    both.save_to_disk(str(tmp_path / "saved"))
    for spec in (both, tmp_path / "saved", parts):
        read = load_preferences(spec)
        assert (read.train, read.held_out, read.split_by) == (PAIRS[:30], PAIRS[30:], "given")


def test_a_name_for_the_hub_is_given_to_datasets_with_the_split_after_the_colon(monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str | None) -> Any:
        asked.append((name, split))
        return {"train": ROWS, "test": ROWS[:3]} if split is None else ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_preferences("somebody/pairs").held_out) == 3
    assert every_pair("somebody/pairs:train_prefs") == sorted(PAIRS, key=str)
    assert asked == [("somebody/pairs", None), ("somebody/pairs", "train_prefs")]


def test_splits_with_other_names_are_refused_with_the_way_to_choose_one(monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {"train_prefs": ROWS, "train_sft": []})
    with pytest.raises(ValueError, match=r"got \['train_prefs', 'train_sft'\].*'somebody/pairs:train_prefs'"):
        load_preferences("somebody/pairs")


def test_the_builtin_pairs_keep_their_split() -> None:
    read = load_preferences("builtin")
    assert (len(read.train), len(read.held_out)) == (20_000, 1_000)
    assert (read.split_by, read.n_malformed, read.conversational) == ("given", 0, False)
    assert not {pair.prompt for pair in read.train} & {pair.prompt for pair in read.held_out}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.jsonl", r"Expected preferences to name a file, but there is no file 'missing.jsonl'"),
        ("missing/data", "a name that datasets.load_dataset takes; got 'missing/data', which could not be loaded"),
        ([], "at least one row, got none from a list"),
        (3, "got int"),
        (ROWS[:1], "at least one to hold out, got 1 and 0"),
        ([{**row, "split": "test"} for row in ROWS], "got 0 and 40"),
        ({"prompt": ["a"], "chosen": ["b"]}, r"Expected splits called train, .*got \['prompt', 'chosen'\]\."),
    ],
)
def test_what_cannot_be_preferences_is_refused_with_what_was_expected(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_preferences(spec)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.json", b'{"chosen": "a"}', r"well-formed \.json file: its rows must stand in a list"),
        ("pairs.json", b'{"chosen": "a"}\n{"chosen": "b"}', r"If it holds one object a line, name it \.jsonl"),
        ("pairs.jsonl", b"\xff\xfe\x00", r"well-formed \.jsonl file"),
        # Without the time of day, which would be in the name of the test, and another one in each worker.
        ("pairs.jsonl.gz", gzip.compress(b"{}" * 1000, mtime=0)[:20], r"well-formed \.jsonl file"),
        ("pairs.jsonl.gz", b"{}", r"well-formed \.jsonl file"),
        ("pairs.parquet", b"{}", r"well-formed \.parquet file"),
        ("pairs.txt", b"one\ntwo", r"a file \(\.jsonl, \.json, \.csv, \.parquet;.*a file of another kind"),
        ("pairs.parquet.gz", b"{}", "a file of another kind"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_preferences(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_what_the_reward_extra_brings_is_asked_for_by_its_name(tmp_path: Path, monkeypatch: Any, module: str) -> None:
    write_parquet(tmp_path / "pairs.parquet", ROWS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "textrlhf\[reward\]"'):
        load_preferences(tmp_path / "pairs.parquet" if module == "pyarrow" else "somebody/pairs")


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_a_plain_text_without_a_prompt_has_an_empty_one() -> None:
    expected = Preference("", "Human: hi\n\nAssistant: hello", "Human: hi\n\nAssistant: go away")
    row = {"chosen": expected.chosen, "rejected": expected.rejected}
    assert parse_preference(row) == parse_preference({**row, "prompt": None}) == expected


QUESTION = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello."), user("How are you?")]


@pytest.mark.parametrize(
    "prompt", [None, [], "", " How are you?", QUESTION], ids=["none", "empty list", "empty", "its last turn", "all"]
)
def test_whole_conversations_have_what_they_share_as_their_prompt(prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": [*QUESTION, assistant("Well.")], "rejected": [*QUESTION, assistant("Why?")]}
    assert parse_preference(row) == Preference(QUESTION, "Well.", "Why?")


def test_messages_are_reduced_to_role_and_content() -> None:
    said = {**user("Hi"), "name": None}
    row = {"prompt": [said], "chosen": [assistant("Yes.")], "rejected": [{**assistant("No."), "tool_calls": None}]}
    assert parse_preference(row) == Preference([user("Hi")], "Yes.", "No.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, r"no 'rejected' among its columns \['prompt', 'chosen'\]"),
        ({"chosen": "b", "rejected": None}, "no 'rejected'"),
        ({"chosen": 3, "rejected": "b"}, "expected 'chosen' to be a text or a list of messages, got 3"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "expected 'prompt' to be a text or a list of messages, got 3"),
        ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": [assistant("b")]}, "one of 'chosen' and 'rejected' is a text"),
        ({"prompt": [user("a")], "chosen": "b", "rejected": "c"}, "'prompt' is a list of messages, but the responses"),
        ({"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}, "messages that don't begin with"),
        (
            {"prompt": "z", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "messages that don't begin with",
        ),
        (
            {"prompt": [user("z")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "begin with messages that are not the prompt's",
        ),
        (
            {"prompt": [user("a")], "chosen": [{"role": "bot", "content": "b"}], "rejected": [assistant("c")]},
            "expected the roles of 'chosen' to be among system, user, assistant, got 'bot'",
        ),
        (
            {"prompt": [{"from": "human", "value": "a"}], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "expected the messages of 'prompt' to have a role and a content",
        ),
        (
            {"prompt": [user("a")], "chosen": [{"role": "assistant", "content": None}], "rejected": [assistant("c")]},
            "expected the contents of 'chosen' to be texts, got None",
        ),
        ({"prompt": [user("a")], "chosen": [], "rejected": [assistant("c")]}, "'chosen' is empty"),
        ({"prompt": [user("a")], "chosen": [assistant(" ")], "rejected": [assistant("c")]}, "'chosen' is empty"),
        (
            {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("e")]},
            r"expected 'chosen' to add one message of the assistant to the prompt, got \['assistant', 'user', 'ass",
        ),
        (
            {"chosen": [user("a"), user("b")], "rejected": [user("a"), user("c")]},
            r"expected 'chosen' to add one message of the assistant to the prompt, got \['user'\]",
        ),
        ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "expected a prompt of messages"),
        (
            {"prompt": [user("a"), assistant("b")], "chosen": [assistant("c")], "rejected": [assistant("d")]},
            "the last of them not the assistant's",
        ),
        ("a text", "expected a mapping of columns, got str"),
    ],
)
def test_a_malformed_row_is_refused_with_the_reason(row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_preference(row)


# ---- how many may be malformed -------------------------------------------------------------------------------------


def test_malformed_rows_within_the_share_are_left_out_counted_and_the_first_three_shown(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS[:16]]
    lines[2:2] = ['{"prompt": ', "", json.dumps({"prompt": "a", "chosen": "b"})]
    lines += [json.dumps({**ROWS[16], "chosen": ""}), json.dumps({**ROWS[17], "split": "middle"})]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    read = load_preferences(tmp_path / "pairs.jsonl", max_malformed=0.2)  # 4 of 20: exactly the share
    assert sorted([*read.train, *read.held_out], key=str) == sorted(PAIRS[:16], key=str)
    assert read.n_malformed == 4
    assert [fault.split(":")[0] for fault in read.malformed] == ["line 3", "line 5", "line 20"]
    assert "not JSON" in read.malformed[0]
    assert read.malformed[1:] == [
        "line 5: no 'rejected' among its columns ['prompt', 'chosen']",
        "line 20: 'chosen' is empty",
    ]


def test_more_than_the_share_is_refused_with_the_share_the_count_and_the_first_three(tmp_path: Path) -> None:
    rows = [*ROWS[:16], *[{"prompt": "a", "chosen": "b", "rejected": "b"}] * 4]
    write_parquet(tmp_path / "pairs.parquet", rows)
    with pytest.raises(ValueError, match=r"at most 19 % of the rows of .*max_malformed.*got 4 of 20") as caught:
        load_preferences(tmp_path / "pairs.parquet", max_malformed=0.19)
    text = str(caught.value)
    assert "row 16: 'chosen' and 'rejected' are the same; row 17: " in text
    assert "row 18" in text
    assert "row 19" not in text
    assert "raise max_malformed" in text


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([*ROWS, CHATS[0]], "row 40: messages, where most rows are texts"),
        ([ROWS[0], *CHATS], "row 0: a text among messages"),
    ],
)
def test_rows_of_the_rarer_kind_are_malformed(rows: list[Any], reason: str) -> None:
    read = load_preferences(rows, max_malformed=0.05)
    assert read.malformed == [reason]
    with pytest.raises(ValueError, match=reason):
        load_preferences(rows, max_malformed=0.0)


def test_rows_of_a_dict_of_splits_are_named_by_their_split() -> None:
    read = load_preferences({"train": ROWS, "test": [ROWS[0], {}]}, max_malformed=0.1)
    assert read.malformed == ["test row 1: no 'chosen' among its columns []"]


@pytest.mark.parametrize("options", [{"max_malformed": 1.0}, {"max_malformed": -0.1}, {"held_out": 0.0}])
def test_a_share_outside_its_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="to be shares"):
        load_preferences(ROWS, **options)


# ---- who is held out -----------------------------------------------------------------------------------------------


def test_a_split_column_is_respected() -> None:
    rows = [{**row, "split": "train" if i % 4 else "eval"} for i, row in enumerate(ROWS)]
    read = load_preferences(rows)
    assert read.held_out == PAIRS[::4]
    assert len(read.train) == 30
    assert read.split_by == "given"


def test_no_prompt_stands_on_both_sides_where_there_are_many() -> None:
    rows = [
        {"prompt": f"Prompt {i % 50}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(400)
    ]  # 8 pairs a prompt
    read = load_preferences(rows, held_out=0.1)
    assert read.split_by == "prompt"
    assert len(read.held_out) == 40
    assert len(read.train) == 360
    assert not {pair.prompt for pair in read.train} & {pair.prompt for pair in read.held_out}


@pytest.mark.parametrize("n_prompts", [1, 2])
def test_pairs_are_held_out_one_by_one_where_there_are_too_few_prompts(n_prompts: int) -> None:
    rows = [{"prompt": f"Prompt {i % n_prompts}", "chosen": f"good {i}", "rejected": "bad"} for i in range(100)]
    read = load_preferences(rows)
    assert (read.split_by, len(read.held_out), len(read.train)) == ("pair", 5, 95)


def test_another_seed_holds_out_others_and_the_same_seed_the_same() -> None:
    first, again, other = (load_preferences(ROWS, held_out=0.2, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.held_out != other.held_out
    assert len(first.held_out) == len(other.held_out) == 8


def test_a_table_gives_pairs_and_not_columns() -> None:
    rows = [{"prompt": "The", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(40)]
    expected = load_preferences(rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for table in (pandas.DataFrame(rows), pyarrow.Table.from_pylist(rows), columns):
        assert load_preferences(table) == expected
    assert load_preferences({"train": pandas.DataFrame(rows), "test": columns}).split_by == "given"
