"""Files that somebody else has written: whatever they say, nothing of theirs is run, and nothing hangs."""

from __future__ import annotations

import ast
import builtins
import io
import json
import pickle
import signal
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from learners import PROMPTS, make_env, make_ppo, save_model
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from agents.algorithms.ppo import PPO
from agents.cli import main
from agents.models.adapter import quiet_peft
from agents.models.pretrained import load_causal_lm
from agents.policies.causal_lm_policy import load_policy
from agents.runs.config import load_config
from agents.state.manifest import MANIFEST, seal
from text_env import chat_templates, reasoning_gym_tasks
from text_env.chat_templates import apply_chat_template
from text_env.rewards import make_reward
from text_env.tokenization import load_tokenizer

ASK = builtins.input
SECONDS = 120
"""How long a test may take. One that hangs fails."""

CODE = """
from pathlib import Path
Path({marker!r}).touch()
def run(completions=(), **_):
    return [0.0] * len(completions)
"""


class Payload:
    """An object that writes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


class Place:
    """A working directory with a module that writes a marker when it is imported, and a small model."""

    def __init__(self, root: Path) -> None:
        self.root, self.marker, self.model = root, root / "marker", root / "run" / "policy"
        (root / "payload.py").write_text(CODE.format(marker=str(self.marker)))
        (root / "prompts.txt").write_text("\n".join(PROMPTS))
        save_model(self.model)

    def edit(self, name: str, **changes: Any) -> None:
        """Change entries of a JSON file of the model."""
        path = self.model / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **changes}))

    def run_with(self, **env: Any) -> None:
        """Write the configuration of a run beside the model."""
        top = {name: env.pop(name) for name in ("algo",) if name in env}
        settings = {"max_new_tokens": 4, "prompts": str(self.root / "prompts.txt"), "reward": "length(budget=4)", **env}
        config = {"model": str(self.model), **top, "env": settings}
        (self.root / "run" / "config.yaml").write_text(yaml.safe_dump(config))

    def command(self, name: str, *more: str) -> int:
        of_command = {
            "evaluate": ["--episodes", "2"],
            "sample": ["--prompt", "I"],
            "critic": ["--texts", "2", "--positions", "2", "--branches", "2"],
        }
        return main([name, "--policy", str(self.model), "--device", "cpu", *of_command[name], *more])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    made = Place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m agents.cli` has it
    monkeypatch.setattr(builtins, "input", lambda *_: "y")  # somebody at a terminal who agrees to everything
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"hung for {SECONDS} seconds"))
    signal.alarm(SECONDS)
    yield made
    signal.alarm(0)
    sys.modules.pop("payload", None)
    assert not made.marker.exists(), "the file's code has run"


# ---- the configuration of a run beside a policy --------------------------------------------------------------------

OF_REWARD = [
    {"reward": "payload:run"},
    {"reward": "0.5*payload:run + 0.1*builtin"},
    {"reward": {"payload:run": 1.0}},
]
EVERYWHERE = [
    {"constraint": "payload:run"},
    {"constraint": "payload.sub:run.attribute"},
    {"env": "payload:Text-v0"},
    {"task": "payload:run"},
]
OF_EVALUATE = [
    *({"gold": "payload:run"}, {"metrics": {"mine": "payload:run"}}, {"prompts": "payload:run"}),
    {"task": "task.jsonl", "task_kwargs": {"extract": "payload:run"}},
    {"task": "task.jsonl", "task_kwargs": {"match": "payload:run"}},
]


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        *(("sample", fields) for fields in EVERYWHERE),
        *(("evaluate", fields) for fields in OF_REWARD + EVERYWHERE + OF_EVALUATE),
        *(("critic", fields) for fields in [*OF_REWARD, *EVERYWHERE, *OF_EVALUATE, {"algo": "payload:run"}]),
    ],
    ids=str,
)
def test_objects_that_only_a_run_names_are_not_imported(
    place: Place, capsys: pytest.CaptureFixture[str], command: str, fields: dict[str, Any]
) -> None:
    (place.root / "task.jsonl").write_text('{"prompt": "I", "answer": "a"}\n')
    (place.model / "value_head.safetensors").touch()
    place.run_with(**fields)
    assert place.command(command) == 1
    message = capsys.readouterr().out
    field = list(fields)[-1]
    assert f"config.yaml, {field}: 'payload" in message
    assert "--trust" in message
    if command == "evaluate":  # the other commands have fewer options
        assert ("give --" in message) == (field not in ("constraint", "env", "metrics"))


@pytest.mark.parametrize("fields", OF_REWARD, ids=str)
def test_texts_are_written_without_the_reward_that_only_a_run_names(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    place.run_with(**fields, gold="payload:run")
    monkeypatch.setattr(builtins, "input", ASK)
    for command in (["sample", "--policy", str(place.model)], ["play", str(place.model)]):
        monkeypatch.setattr("sys.stdin", io.StringIO("g\n"))
        assert main([*command, "--prompt", "I", "--device", "cpu"]) == 0
        message = " ".join(capsys.readouterr().out.split())
        assert "Texts are not scored." in message
        assert "config.yaml, reward: 'payload" in message
        assert "not scored: --trust would score it" in message


@pytest.mark.parametrize("fields", EVERYWHERE, ids=str)
def test_what_else_a_run_names_is_refused_beside_its_reward(
    place: Place, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    place.run_with(**fields, reward="payload:other")
    assert place.command("sample") == 1
    assert f"config.yaml, {list(fields)[-1]}: 'payload" in capsys.readouterr().out


@pytest.mark.parametrize("more", [("--trust",), ("--reward", "payload:run")])
def test_what_is_trusted_or_named_by_hand_is_imported(place: Place, more: tuple[str, ...]) -> None:
    """The other way round: without the refusal, the marker would have been there."""
    place.run_with(reward="payload:run")
    assert place.command("sample", *more) == 0
    assert place.marker.exists()
    place.marker.unlink()


@pytest.mark.parametrize("command", ["sample", "evaluate", "critic"])
@pytest.mark.parametrize("form", ["{0}", "0.5*{0}+0.1*length(budget=4)"])
def test_servers_that_only_a_run_names_are_sent_nothing(
    place: Place, capsys: pytest.CaptureFixture[str], command: str, form: str
) -> None:
    (place.model / "value_head.safetensors").touch()
    with socketserver.TCPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place.run_with(reward=form.format(f"http://127.0.0.1:{server.server_address[1]}/score"))
        try:
            assert place.command(command) == (0 if command == "sample" else 1)  # which writes, and scores nothing
            assert Listener.heard == []
            message = capsys.readouterr().out
            assert "config.yaml, reward: 'http://127.0.0.1" in message
            assert "nothing has been sent" in message
            if command == "sample":  # the other way round: the server is asked, and says nothing that helps
                place.command("sample", "--trust")
                assert Listener.heard
        finally:
            Listener.heard.clear()
            server.shutdown()


class Listener(socketserver.BaseRequestHandler):
    """Notes that somebody has called, and answers that the request is wrong."""

    heard: ClassVar[list[bytes]] = []

    def handle(self) -> None:
        self.heard.append(self.request.recv(64))
        self.request.sendall(b"HTTP/1.0 400 no\r\n\r\n")


@pytest.mark.parametrize("command", ["sample", "evaluate", "critic", "play", "train"])
def test_a_task_that_runs_answers_is_refused_where_only_a_run_says_that_it_may(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    pytest.importorskip("reasoning_gym")
    (place.model / "value_head.safetensors").touch()
    task = {"task": "reasoning_gym:countdown", "task_kwargs": {"runs_answers": True}}
    place.run_with(**task, reward="task", prompts="builtin")
    run = str(place.root / "run")
    others = {"play": ["play", run], "train": ["train", "--resume", run]}

    def called(*more: str) -> str:
        status = main([*others[command], *more]) if command in others else place.command(command, *more)
        assert status == 1
        return " ".join(capsys.readouterr().out.split())

    message = called()
    assert "config.yaml, task_kwargs: 'runs_answers' would have the model's answers run as Python" in message
    assert "pass --trust" in message

    def made(*_: Any) -> None:
        raise ValueError("the task is made")

    monkeypatch.setattr(reasoning_gym_tasks, "_dataset", made)
    assert "the task is made" in called("--trust")


def test_what_is_named_by_hand_leaves_the_rest_of_the_file_untrusted(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.run_with(reward="payload:run", constraint="payload:other")
    assert place.command("sample", "--reward", "length(budget=4)") == 1
    assert "constraint: 'payload:other'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "reward: !!python/object/apply:pathlib.Path.touch [{marker}]",
        "!!python/object/new:payload.run []",
        "env: {{reward: !!python/name:payload.run }}",
        "env: !!python/module:payload",
    ],
)
def test_yaml_tags_are_refused(place: Place, text: str) -> None:
    path = place.root / "run" / "config.yaml"
    path.write_text(text.format(marker=place.marker))
    with pytest.raises(ValueError, match="not YAML"):
        load_config(path)
    assert place.command("sample") == 1


@pytest.mark.parametrize("field", ["reward", "stop", "metrics", "task_kwargs"])
def test_a_file_that_stands_for_billions_of_values_is_refused(place: Place, field: str) -> None:
    nested = [f"&x0 [{'a, ' * 9}]", *(f"&x{depth} [{f'*x{depth - 1}, ' * 9}]" for depth in range(1, 12))]
    path = place.root / "run" / "config.yaml"
    path.write_text(f"env: {{{field}: [{', '.join(nested)}]}}")
    with pytest.raises(ValueError, match=r"stands for 3\.57e\+11 values"):
        load_config(path)


@pytest.mark.parametrize("value", ["[" * 5000 + "]" * 5000, "&x [*x]"])
def test_a_file_that_is_nested_without_end_is_refused(place: Place, value: str) -> None:
    path = place.root / "run" / "config.yaml"
    path.write_text(f"env: {{stop: {value}}}")
    with pytest.raises(ValueError, match="nested too deeply"):
        load_config(path)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def edited_state(place: Place, edit: Callable[[dict[str, Any]], Any]) -> Path:
    make_ppo().save(place.root / "checkpoint")
    path = place.root / "checkpoint" / "state.json"
    state = json.loads(path.read_text())
    edit(state["values"])
    path.write_text(json.dumps(state))
    (path.parent / MANIFEST).unlink()
    seal(path.parent, {})  # it is no signature: whoever edits a checkpoint can seal it anew
    return path.parent


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state["policy_kwargs"].update(constraint="payload:run"),
        lambda state: state["policy_kwargs"].update(constraint=["payload:run"]),
        lambda state: state["arguments"].update(clip_range="payload:run"),
        lambda state: state.update(algorithm="payload:run"),
        lambda state: state.update(policy_class="payload:run"),
        lambda state: state["counters"].update(policy_class="payload:run"),
        lambda state: state["policy_kwargs"].update(
            lora={"r": 2, "megatron_config": {"a": 1}, "megatron_core": "payload"}
        ),
    ],
    ids=["constraint", "constraints", "argument", "algorithm", "policy class", "counter", "adapter"],
)
def test_a_checkpoint_that_names_code_is_refused(place: Place, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = edited_state(place, edit)
    with pytest.raises(ValueError, match=r"payload|given again|counters|megatron"):
        PPO.load(path, env=make_env(), device="cpu")


# ---- weights -------------------------------------------------------------------------------------------------------


def pickled(place: Place, path: Path, by_torch: bool) -> None:
    if by_torch:
        torch.save({"weight": Payload(place.marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(place.marker)))


@pytest.mark.parametrize("by_torch", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "weights.ckpt"])
@pytest.mark.parametrize("load", [load_causal_lm, make_reward])
def test_weights_in_pickles_are_refused_whatever_they_are_called(
    place: Place, name: str, load: Callable[[str], Any], by_torch: bool
) -> None:
    (place.model / "model.safetensors").unlink()
    pickled(place, place.model / name, by_torch)
    with pytest.raises(ValueError, match="safetensors"):
        load(str(place.model))


def test_an_index_that_names_a_pickle_is_refused(place: Place) -> None:
    (place.model / "model.safetensors").unlink()
    pickled(place, place.model / "part.bin", True)
    place.edit("model.safetensors.index.json", metadata={}, weight_map={"transformer.wte.weight": "part.bin"})
    with pytest.raises(ValueError, match=r"safetensors, got \['part.bin'\].*convert them"):
        load_causal_lm(str(place.model))


@pytest.mark.parametrize("by_torch", [True, False])
def test_a_critic_in_a_pickle_is_refused(place: Place, by_torch: bool) -> None:
    pickled(place, place.model / "value_head.safetensors", by_torch)
    with pytest.raises(SafetensorError):
        load_policy(place.model, make_env(), "cpu").load_value_head(place.model)


# ---- code beside weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "payload"])
@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer, make_reward])
def test_python_code_beside_a_model_is_not_run_even_if_somebody_types_yes(
    place: Place, load: Callable[[str], Any], model_type: str
) -> None:
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    place.edit("config.json", model_type=model_type, auto_map=dict.fromkeys(kinds, "payload.run"))
    place.edit(
        "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["payload.run", "payload.run"]}
    )
    (place.model / "payload.py").write_text((place.root / "payload.py").read_text())
    try:
        load(str(place.model))
    except ValueError as error:
        # A model of a known type is loaded, without its code; then a language model is no reward model.
        expected = "score.weight" if (load, model_type) == (make_reward, "gpt2") else "auto_map"
        assert expected in str(error)  # noqa: PT017
    else:
        assert model_type == "gpt2"


@pytest.mark.parametrize("value", ["payload/kernel", {"": "payload/kernel@main:run"}])
def test_a_kernel_that_a_config_names_is_not_loaded(place: Place, value: Any) -> None:
    place.edit("config.json", attn_implementation=value)
    with pytest.raises(ValueError, match="programs"):
        load_causal_lm(str(place.model))


# ---- chat templates ------------------------------------------------------------------------------------------------

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{{ 9 ** (9 ** (9 ** 9)) }}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ 'a' * 10 ** 8 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch marker') }}",
        "{{ raise_exception.__globals__['__builtins__']['__import__']('payload') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_that_loop_or_reach_for_more_are_ended(
    place: Place, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 0.5)
    (place.model / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(place.model)
    assert tokenizer.chat_template == template
    with pytest.raises(ValueError, match="The chat template of"):
        apply_chat_template(tokenizer, [[{"role": "user", "content": "hi"}]])


def test_a_template_writes_what_the_tokenizer_itself_writes() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        + ("{% if add_generation_prompt %}<assistant>{% endif %}")
    )
    asked = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "I"}]
    for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        expected = tokenizer.apply_chat_template([asked, asked[:1]], tokenize=False, **options)
        assert apply_chat_template(tokenizer, [asked, asked[:1]], **options) == expected


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(place: Place) -> Path:
    model = AutoModelForCausalLM.from_pretrained(place.model)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=True)
    with quiet_peft():
        get_peft_model(model, config).save_pretrained(str(place.root / "adapter"))
    return place.root / "adapter"


def edit_adapter(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
@pytest.mark.parametrize("base", ["adapter", "./run/../adapter", "other"])
def test_an_adapter_that_is_its_own_base_is_refused(
    place: Place, adapter: Path, load: Callable[[Path], Any], base: str
) -> None:
    edit_adapter(adapter, base_model_name_or_path=base)
    (place.root / "other").mkdir()
    (place.root / "other" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(adapter)}))
    with pytest.raises(ValueError, match="is its own base"):
        load(adapter)


@pytest.mark.parametrize("by_torch", [True, False])
def test_an_adapter_in_a_pickle_is_refused(place: Place, adapter: Path, by_torch: bool) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "value_head.safetensors")
    pickled(place, adapter / "adapter_model.bin", by_torch)
    with pytest.raises(ValueError, match=r"safetensors, got \['adapter_model.bin'\]"):
        load_causal_lm(adapter)


def test_an_adapter_that_names_a_module_is_refused(adapter: Path) -> None:
    edit_adapter(adapter, megatron_config={"a": 1}, megatron_core="payload")
    with pytest.raises(ValueError, match="PEFT would import the module 'payload'"):
        load_causal_lm(adapter)


@pytest.mark.parametrize("content", ["[]", "{", '{"base_model_name_or_path": {"a": 1}}'])
def test_the_config_of_an_adapter_that_is_none_is_refused(adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_causal_lm(adapter)


# ---- the doors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("called", "where"),
    [
        ("from_pretrained", {"text_env/pretrained_files.py", "agents/models/pretrained.py"}),
        (
            "import_module",
            {"text_env/imports.py", "text_env/task_names.py", "text_env/namesake.py", "agents/__init__.py"},
        ),
        ("apply_chat_template", set()),
        *((name, set()) for name in ("unsafe_load", "full_load", "Unpickler", "read_pickle")),
    ],
)
def test_there_is_one_door_for_whatever_could_run_code(called: str, where: set[str]) -> None:
    """What else imports by name or loads a model would not be held back by the refusals above."""
    root = Path(__file__).parents[2]
    found = set()
    for path in (*root.glob("text_env/**/*.py"), *root.glob("agents/**/*.py")):
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        if any(isinstance(call, ast.Attribute) and call.attr == called for call in calls):
            found.add(path.relative_to(root).as_posix())
    assert found == where
