"""The model card of a run, and `textrlhf push` to a stand-in for the Hub."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from learners import save_model
from test_report import HOSTILE, write_run

from agents.cli import main
from agents.runs.model_card import code_block, code_span, write_card
from agents.runs.push import push

COMMIT = "https://huggingface.co/me/critic/commit"
EVALUATION = {
    "episodes": 64,
    "prompts": 32,
    "prompt_set": "builtin",
    "compared_with": "reference",
    "kl": 3.14159,
    "win_rate": 0.75,
    "policy": {"score": 1.5, "text": "no number"},
    "reference": {"score": -0.25},
}


def run_with_policy(directory: Path, **kwargs: Any) -> Path:
    write_run(directory, **kwargs)
    save_model(directory / "policy")
    return directory


# ---- the card ------------------------------------------------------------------------------------------------------


def test_the_card_says_what_from_what_and_how_far(tmp_path: Path) -> None:
    run = run_with_policy(tmp_path / "run")
    text = write_card(run).read_text()
    for said in ("`run`", "`ppo`", "trained from | `builtin`", "reward | `builtin+sentiment`", "4000 generated"):
        assert said in text
    assert "KL (nats a text) | " in text
    assert "    The movie good\n" in text  # a text, as a block of code
    assert "--config config.yaml" in text
    assert "    total_timesteps: 4000\n" in text
    assert "## Evaluation" not in text


def test_the_metadata_are_those_of_the_hub(tmp_path: Path) -> None:
    data = ModelCard.load(write_card(run_with_policy(tmp_path / "run", model="owner/small"))).data
    assert data.base_model == "owner/small"
    assert data.library_name == "transformers"
    assert {"textrlhf", "ppo"} <= set(data.tags or ())
    local = ModelCard.load(write_card(run_with_policy(tmp_path / "other", model=str(tmp_path)))).data
    assert local.base_model is None  # a path is no name on the Hub


def test_an_evaluation_in_the_directory_of_the_run_is_told(tmp_path: Path) -> None:
    run = run_with_policy(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    text = write_card(run).read_text()
    assert "| `score` | 1.5 | -0.25 |" in text
    assert "3.14 nats a text. It scores higher for 75 % of the prompts." in text
    assert "no number" not in text
    for other in ([], {"policy": {}}, {**EVALUATION, "compared_with": "# Heading", "# Heading": {}}):
        (run / "evaluation.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"evaluation.json to be what `textrlhf evaluate --json` writes"):
            write_card(run)


def test_an_evaluation_against_another_policy_is_told_in_words(tmp_path: Path) -> None:
    run = run_with_policy(tmp_path / "run")
    against = {**EVALUATION, "compared_with": "against", "against": {"score": 0.5}}
    (run / "evaluation.json").write_text(json.dumps(against))
    text = write_card(run).read_text()
    assert "64 texts of this model and as many of another model, for 32 prompts" in text
    assert "| | this model | another model |\n| --- | --- | --- |\n| `score` | 1.5 | 0.5 |\n" in text


def test_the_card_shows_what_applies_to_the_texts_of_one_writer_only(tmp_path: Path) -> None:
    run = run_with_policy(tmp_path / "run")
    figures = {"policy": {"score": 1.5, "reward/short": 1.0}, "reference": {"score": 2.5, "reward/long": 8.0}}
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, **figures}))
    text = write_card(run).read_text()
    assert "| `score` | 1.5 | 2.5 |\n| `reward/short` | 1 | – |\n| `reward/long` | – | 8 |\n" in text


def test_what_files_say_is_never_markdown_of_the_card(tmp_path: Path) -> None:
    words = f"```\n# Heading\n---\n{HOSTILE}"
    run = run_with_policy(tmp_path / "run", words=words, model=f"`a` | b\n# {HOSTILE}")
    text = write_card(run).read_text()
    assert [line for line in text.splitlines() if line.startswith(("# ", "<"))] == ["# `run`"]
    assert all(line.startswith("    ") or "`` `a` ¦ b" in line for line in text.splitlines() if "<script>" in line)
    figures = dict.fromkeys(("episodes", "prompts", "kl", "win_rate"), words)
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, **figures, "prompt_set": words}))
    row = {"timesteps": 99999, "prompt": "half a character", "completion": "\ud83c", "score": words}
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    marked = write_card(run).read_text()
    assert "half a character?" in marked
    assert [line for line in marked.splitlines() if line.startswith(("# ", "<"))] == ["# `run`"]
    code = re.sub(r"(`+).*?\1", "", "\n".join(line for line in marked.splitlines() if not line.startswith("    ")))
    assert "<script>" not in code
    assert "49" not in text.split("## Texts")[1].split("## Use")[0]  # {{ 7*7 }} is not evaluated
    assert code_span("") == "` `"
    assert code_block("a\n\nb") == "    a\n    \n    b"


def test_a_training_leaves_a_card(tmp_path: Path) -> None:
    options = ["--no-progress", "--total-timesteps", "64", "--n-episodes", "4", "--max-new-tokens", "6"]
    assert main(["train", *options, "--device", "cpu", "--run-dir", str(tmp_path / "run")]) == 0
    card = (tmp_path / "run" / "policy" / "README.md").read_text()
    assert "generated in training, of 64" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


# ---- push ----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files asks for."""

    committed: dict[str, bytes] = {}  # noqa: RUF012  emptied by the fixture
    private: bool | None = None
    allowed = True
    message = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed:
            return self._answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            name = "/".join((json.loads(body).get("organization") or "me", json.loads(body)["name"]))
            type(self).private = json.loads(body).get("private") or json.loads(body).get("visibility") == "private"
            return self._answer({"url": f"http://{self.headers['Host']}/{name}"})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self._answer({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    type(self).message = line["value"]["summary"]
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer(
                {"commitUrl": "https://huggingface.co/me/critic/commit/abc", "commitOid": "abc", "success": True}
            )
        return self._answer({"warnings": [], "errors": []})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    Hub.committed.clear()
    monkeypatch.setattr(Hub, "allowed", True)
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_policy_is_pushed_with_its_card_and_nothing_else_of_the_run(tmp_path: Path, hub: str) -> None:
    run = run_with_policy(tmp_path / "run")
    assert push(run, "me/critic", private=True, endpoint=hub).endswith("/commit/abc")
    assert Hub.private
    assert set(Hub.committed) == {path.name for path in (run / "policy").iterdir()}
    assert Hub.committed["model.safetensors"] == (run / "policy" / "model.safetensors").read_bytes()
    assert b"trained from" in Hub.committed["README.md"]


def test_a_policy_without_a_run_is_pushed_as_it_is(tmp_path: Path, hub: str) -> None:
    policy = Path(save_model(tmp_path / "policy"))
    push(policy, "me/critic", endpoint=hub)
    assert set(Hub.committed) == {path.name for path in policy.iterdir()}
    assert "README.md" not in Hub.committed


def test_a_model_beside_a_config_of_something_else_is_no_policy_of_a_run(tmp_path: Path, hub: str) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    model = Path(save_model(tmp_path / "model"))
    push(model, "me/critic", endpoint=hub)
    assert set(Hub.committed) == {path.name for path in model.iterdir()}
    assert "README.md" not in Hub.committed


def test_a_policy_is_pushed_with_its_card_from_inside_its_directory(
    tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_with_policy(tmp_path / "run") / "policy")
    push(Path(), "me/critic", endpoint=hub)
    assert b"trained from" in Hub.committed["README.md"]
    assert Hub.message == "A policy of run"


def test_a_hub_that_refuses_is_an_error_that_says_what_to_do(
    tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "allowed", False)
    with pytest.raises(ConnectionError, match=r"(?s)'me/critic' could not be pushed to http://127.*hf auth login"):
        push(run_with_policy(tmp_path / "run"), "me/critic", endpoint=hub)
    assert not Hub.committed


def test_the_command_refuses_before_anything_is_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(run_with_policy(tmp_path / "run"))
    for arguments, said in (
        ([run, "me/critic"], "HF_HUB_OFFLINE is set, so that nothing can be pushed"),
        ([run, "me/critic/more"], "Expected the repository as owner/name, got 'me/critic/more'"),
        ([str(tmp_path), "me/critic"], "Expected the directory of a run or of a policy; found no model in"),
    ):
        assert main(["push", *arguments]) == 1
        assert said in " ".join(capsys.readouterr().out.split())
