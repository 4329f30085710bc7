"""Several processes, each with its share of the episodes, train to the weights of one process with all of them: with
all weights in each process, and with a part of every weight in each.
"""

from __future__ import annotations

import functools
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from learners import largest_difference, make_env, make_policy
from rank_trainings import CUT_UP, KINDS, make, train
from transformers import AutoModelForCausalLM

from agents.algorithms.accelerate_engine import AccelerateEngine, _filled, _sizes, together
from agents.algorithms.engine import RankLost, sharded
from agents.algorithms.fsdp_engine import _check, settings_of_launch
from agents.state import checkpoint
from agents.state.checkpoint import Tree
from benchmarks.scale_out.trainings import RANKS

TESTS = Path(__file__).parents[1]
# What a clock measures.
CLOCKS = ("time/fps", "time/time_elapsed", "time/tokens_per_second", "time/update_tokens_per_second")


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each process has written of each training."""
    directory = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", str(TESTS / "algorithms" / "rank_trainings.py"), str(directory)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FSDP_VERSION": "2"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return directory


@functools.cache
def of_one(kind: str) -> Tree:
    """The same training in this process."""
    return train(make(kind))


def flat(state: Tree) -> dict[str, torch.Tensor]:
    """The moments of an optimiser by the number of their weight and their name."""
    return {f"{index} {name}": moment for index, moments in state.items() for name, moment in moments.items()}


@pytest.mark.parametrize(
    ("how", "kind"), [*(("whole", kind) for kind in KINDS), *(("cut up", kind) for kind in CUT_UP)]
)
def test_two_processes_train_to_the_weights_of_one(how: str, kind: str, of_ranks: Path) -> None:
    first, second = (checkpoint.load(of_ranks / how / kind / f"rank_{rank}") for rank in range(RANKS))
    one = of_one(kind)
    before, weights, logged = one["before"], one["weights"], one["logged"]
    assert largest_difference(first["before"], before) == largest_difference(first["weights"], second["weights"]) == 0.0
    assert largest_difference(first["weights"], weights) < 1e-6
    assert largest_difference(before, weights) > 1e-4
    assert largest_difference(flat(first["moments"]), flat(one["moments"])) < 1e-5
    lengths = logged[-1]["lengths"]
    assert len(set(lengths)) > 2  # uneven texts, and other sums of them in the two halves
    assert sum(first["logged"][-1]["lengths"]) != sum(second["logged"][-1]["lengths"])
    assert lengths == [*first["logged"][-1]["lengths"], *second["logged"][-1]["lengths"]]
    for ours, *theirs in zip(logged, first["logged"], second["logged"], strict=True):
        for name in ours.keys() - set(CLOCKS) - {"lengths", "micro_batch_tokens"}:
            expected = ours[name]
            for row in theirs:
                tolerance = 1e-5 if name == "train/ratio_first_max" else 1e-6  # which is nothing but rounding
                assert row[name] == pytest.approx(expected, rel=2e-4, abs=tolerance, nan_ok=True), name
    if kind == "ppo that runs out of memory":
        assert first["logged"][-1]["micro_batch_tokens"] == second["logged"][-1]["micro_batch_tokens"] < 48
    if "early" in kind:
        assert logged[-1]["train/n_updates"] < 4 * 3
    if "adapter" in kind:
        assert logged[0]["train/update_kept"] < 1  # the update went too far, and was taken back in part
    assert not any(math.isnan(row["train/loss"]) for row in logged)


@pytest.mark.parametrize("kind", CUT_UP)
def test_a_checkpoint_of_weights_that_are_cut_up_is_that_of_one_process(kind: str, of_ranks: Path) -> None:
    states = [checkpoint.load(of_ranks / "cut up" / kind / f"state_{rank}") for rank in range(RANKS)]
    one, (first, second) = of_one(kind), states
    assert largest_difference(flat(first["optimizer"]), flat(one["moments"])) < 1e-5
    assert second["optimizer"] == {}  # the first one writes
    for state in states:
        assert largest_difference(state["policy"], state["policy_again"]) == 0.0
    assert largest_difference(flat(first["optimizer"]), flat(first["optimizer_again"])) == 0.0


@pytest.mark.parametrize("kind", ["ppo", "ppo of an adapter"])
def test_during_an_update_a_process_holds_its_part_of_the_weights_and_refuses_to_save_it(
    kind: str, of_ranks: Path
) -> None:
    states = [checkpoint.load(of_ranks / "cut up" / kind / f"state_{rank}") for rank in range(RANKS)]
    weights = make(kind).policy
    total = sum(parameter.nbytes for parameter in weights.parameters())
    assert sum(state["held"] for state in states) == total
    kept = 0 if weights.lm.adapter is None else sum(p.nbytes for p in weights.lm.model.lm_head.parameters())
    for state in states:
        assert total / RANKS * 0.9 < state["held"] < total / RANKS * 1.1
        assert state["left"] - kept <= 4 * len([*weights.parameters()])
        assert "Expected finite weights to save" in state["refused"]
    assert not (of_ranks / "cut up" / kind / "refused").exists()


def test_the_first_process_saves_the_policy_by_itself(of_ranks: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(of_ranks / "cut up" / "ppo" / "policy").state_dict()
    weights = of_one("ppo")["weights"]
    ours = {name: weights[f"lm.model.{name}"] for name in saved}
    assert largest_difference(saved, ours) < 1e-6


ENDS = """
import atexit, os, sys
import torch, torch.distributed as dist
atexit.register(lambda: print("still connected" if dist.is_initialized() else "has left"))  # the last to be called
from agents.algorithms.accelerate_engine import AccelerateEngine
AccelerateEngine.seed(0)
if os.environ["RANK"] == "0":
    for _ in range(300):
        dist.all_reduce(torch.zeros(3), async_op=True)
    raise ValueError("of its own")
sys.stdin.read()
for _ in range(300):
    dist.all_reduce(torch.zeros(3), async_op=True)
"""


def test_a_process_leaves_the_others_before_it_ends_and_does_not_wait_for_them_in_vain() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", ENDS],
            env={**os.environ, **names, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(TESTS.parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    )
    with first, second:
        assert first.stderr is not None
        # While the second one does not take part in what the first has begun.
        assert "ValueError: of its own" in first.stderr.read()
        assert first.wait() == 1
        assert second.poll() is None
        said, complaint = second.communicate("")
        assert second.returncode == 0, complaint
        assert said == "has left\n"


def test_what_can_not_be_shared_is_refused() -> None:
    engine = AccelerateEngine.__new__(AccelerateEngine)  # which would wait for other processes
    engine._n = 4
    assert engine.share(24) == 6
    assert engine.share(24, of=3) == 6
    with pytest.raises(ValueError, match=r"divisible into 4 equal shares, one .* got 18: .* multiple of 4"):
        engine.share(18)
    with pytest.raises(ValueError, match=r"4 equal shares of whole groups of 4, .* got 24: take a multiple of 16"):
        engine.share(24, of=4)


def test_gradients_are_bundled_in_order_up_to_the_limit() -> None:
    """In 16 bits, too, which are added up in 32."""
    pieces = [torch.full((n,), float(n), dtype=torch.bfloat16) for n in (3, 4, 1, 8, 2)]
    bundles = list(_filled(iter(pieces), limit=8))
    assert [[len(piece) for piece in bundle] for bundle in bundles] == [[3, 4, 1], [8], [2]]
    assert _sizes(pieces) == {(torch.device("cpu"), torch.float32): 18}


def test_a_lost_process_is_named_in_words_that_help() -> None:
    said = r"Process 0 of 1 has lost another one: .* for 1800 s .* Here: Connection closed by peer$"
    with pytest.raises(RankLost, match=said), together():
        raise RuntimeError("Connection closed by peer\nand more")


def test_errors_that_do_not_speak_of_the_connection_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), together(surely=False):
        raise RuntimeError("shapes")
    with pytest.raises(RankLost, match=r"Timed out waiting 5ms"), together(surely=False):
        raise RuntimeError("Timed out waiting 5ms for recv operation to complete")


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({"FSDP_VERSION": "1"}, r"Expected FSDP2 .* got version 1"),
        ({}, r"Expected FSDP2 .* got version 1"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, r"without fsdp_offload_params"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"take --gradient-checkpointing"),
        ({"FSDP_VERSION": "2", "FSDP_IGNORED_MODULES": "lm_head"}, r"without fsdp_ignored_modules"),
    ],
)
def test_what_fsdp_is_not_asked_for_is_refused(
    variables: dict[str, str], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=refused):
        settings_of_launch()


def test_the_settings_of_a_launch_are_accelerates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert settings_of_launch().reshard_after_forward is True
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,LlamaAttention")
    settings = settings_of_launch()
    assert settings.reshard_after_forward is False
    assert settings.transformer_cls_names_to_wrap == ["LlamaMLP", "LlamaAttention"]


def test_accelerate_tells_the_processes_that_it_starts_to_cut_weights_up(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    for more, expected in (["--multi_gpu"], False), (["--use_fsdp", "--fsdp_version", "2"], True):
        arguments = launch_command_parser().parse_args([*options, *more, "-m", "agents.cli"])
        for name, value in prepare_multi_gpu_env(arguments).items():
            monkeypatch.setenv(name, value)
        assert sharded() is expected
    assert settings_of_launch().reshard_after_forward is True


def test_policies_that_can_not_be_cut_up_are_refused() -> None:
    env = make_env()
    with pytest.raises(ValueError, match=r"Expected compile_forward=False with FSDP"):
        _check(make_policy(env, compile_forward=True))
    with pytest.raises(ValueError, match=r"Expected one of PyTorch's optimisers .* with FSDP, got Adafactor"):
        _check(make_policy(env, optimizer_class=torch.optim.Adafactor))
    _check(make_policy(env, optimizer_class=torch.optim.AdamW))
