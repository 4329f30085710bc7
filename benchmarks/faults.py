"""What happens to checkpoints: files are damaged, the process dies in the middle of a save, the disk is full.

Every fault is done to a small history of checkpoints, whose states are known. Then what is left is read, and compared.
Processes die, and disks are full, in forked children; so the faults are real ones.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from agents.state import checkpoint
from agents.state.history import CheckpointHistory
from agents.state.manifest import MANIFEST, CheckpointError, seal
from agents.state.replacing import PARTIAL

# ---- damages -------------------------------------------------------------------------------------------------------


class Damage(NamedTuple):
    """Something that happens to the files of a checkpoint.

    :param kind: what happens, for the table.
    :param names: what the error must name.
    :param do: does it to a directory.
    """

    kind: str
    names: tuple[str, ...]
    do: Callable[[Path], object]


def damages(good: Path, others: dict[str, Path], flips: int, rng: random.Random) -> Iterator[Damage]:
    """
    :param good: the checkpoint that is going to be damaged, a copy of it each time.
    :param others: checkpoints of the same run, by what they are (``"a later"``), whose files get into it.
    :param flips: the number of flipped bits in each file.
    :param rng: where they are.
    :return: the damages.
    """
    files = sorted(path.name for path in good.iterdir())
    for name in files:
        content = (good / name).read_bytes()
        for bit in sorted(rng.sample(range(8 * len(content)), flips)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            yield Damage("a bit is flipped", (name,), partial(_write, name, bytes(flipped)))
        for size in (0, 1, len(content) // 2, len(content) - 1):
            yield Damage("a file is cut short", (name,), partial(_write, name, content[:size]))
        yield Damage("a file is longer", (name,), partial(_write, name, content + b"\0"))
        yield Damage("a file is longer", (name,), partial(_write, name, content + content))
        start = len(content) // 3
        zeros = content[:start] + bytes(16) + content[start + 16 :]
        if zeros != content:
            yield Damage("a block is zeros", (name,), partial(_write, name, zeros))
        yield Damage("a file is removed", (name,), partial(_remove, name))
        yield Damage("a directory is in place of a file", (name,), partial(_directory_instead, name))
    for which, other in others.items():
        for n in range(1, len(files)):
            for names in itertools.combinations(files, n):
                kept = [name for name in files if name not in names]
                if any(_same(good, other, some) for some in (names, kept)):
                    continue  # files that are the same in both: the result is one of the two
                kind = f"files of {which} checkpoint are mixed in"
                strangers = kept if MANIFEST in names else names  # to the manifest that is there
                wrong = tuple(name for name in strangers if not _same(good, other, [name]))
                yield Damage(kind, wrong, partial(_copy_from, other, names))
    for unknown in ("pytorch_model.bin", "policy.safetensors.tmp", "state.json.orig"):
        yield Damage("there is an unknown file", (unknown,), partial(_write, unknown, b"x"))
    yield Damage("it is of another format", (MANIFEST,), _other_format)
    yield Damage("all files are removed", (MANIFEST,), lambda directory: [_remove(name, directory) for name in files])


def examine_damages(work: Path, save: Callable[[int, Path], object], flips: int, seed: int = 0) -> dict[str, Any]:
    """Do every damage to the newest of two checkpoints of a history.

    :param work: an empty directory.
    :param save: writes the state of a number to a directory: the run after so many iterations.
    :param flips: the number of flipped bits in each file.
    :param seed: seed of the places of the bits.
    :return: the number of cases of each kind, and three lists, which should be empty: damages that were accepted,
        damages of which the error doesn't say which files they are, and damages after which the history didn't give the
        checkpoint before.
    """
    for number in (1, 2, 3):
        save(number, work / f"{number}")
    history = CheckpointHistory(work / "history")
    shutil.copytree(work / "1", history.path(1))
    before = checkpoint.load(work / "1")
    cases: Counter[str] = Counter()
    accepted, unnamed, unrepaired = [], [], []
    others = {"an earlier": work / "1", "a later": work / "3"}
    for damage in damages(work / "2", others, flips, random.Random(seed)):
        cases[damage.kind] += 1
        case = f"{damage.kind}: {', '.join(damage.names)}"
        shutil.rmtree(history.path(2), ignore_errors=True)
        shutil.copytree(work / "2", history.path(2))
        damage.do(history.path(2))
        try:
            checkpoint.load(history.path(2))
            accepted.append(case)
        except (CheckpointError, OSError) as error:
            if not all(name in str(error) for name in damage.names):
                unnamed.append(case)
        path, tree = history.newest()
        if (
            path != history.path(1)
            or not same(tree, before)
            or [path for path, _ in history.damaged] != [history.path(2)]
        ):
            unrepaired.append(case)
    return {
        "cases": sum(cases.values()),
        "by_kind": dict(cases),
        "accepted": accepted,
        "unnamed": unnamed,
        "unrepaired": unrepaired,
    }


def same(left: Any, right: Any) -> bool:
    """
    :param left: a tree, or a part of one.
    :param right: another.
    :return: whether they are equal, bit for bit.
    """
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return bool(left == right)


def _write(name: str, content: bytes, directory: Path) -> None:
    (directory / name).write_bytes(content)


def _remove(name: str, directory: Path) -> None:
    (directory / name).unlink()


def _directory_instead(name: str, directory: Path) -> None:
    _remove(name, directory)
    (directory / name).mkdir()


def _copy_from(other: Path, names: tuple[str, ...], directory: Path) -> None:
    for name in names:
        shutil.copyfile(other / name, directory / name)


def _other_format(directory: Path) -> None:
    """As the next version of this package may write it: all that is wrong is the number."""
    content = json.loads((directory / MANIFEST).read_text())
    _remove(MANIFEST, directory)
    seal(directory, content["notes"], format_number=content["format"] + 1)


def _same(one: Path, other: Path, names: Any) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# ---- saves that are interrupted ------------------------------------------------------------------------------------


def small_state(number: int) -> dict[str, Any]:
    """
    :param number: tells one state from another.
    :return: a tree like that of an algorithm: some files of tensors, tied weights among them, and JSON values.
    """
    weight = torch.full((8, 4), float(number))
    return {
        "policy": {"embedding": weight, "head": weight, "bias": torch.full((8,), number, dtype=torch.bfloat16)},
        "optimizer": {"state": {"0": {"exp_avg": weight / 3}}, "param_groups": [{"lr": 0.1}]},
        "counters": {"num_timesteps": number},
    }


class Save(NamedTuple):
    """A save that something comes in between.

    :param before: the numbers of the states that are saved before it, oldest first.
    :param number: the number of the state that it saves.
    :param alone: it replaces a single checkpoint, as an algorithm's ``save`` does; else it is one of a history that
        keeps two and the best.
    """

    before: tuple[int, ...]
    number: int
    alone: bool = False

    def prepare(self, directory: Path) -> None:
        """
        :param directory: is emptied, and filled with the states before.
        """
        ready = directory.with_name(directory.name + ".ready")
        if not ready.exists():
            ready.mkdir(parents=True)
            for number in self.before:
                self._save(ready, number)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(ready, directory)

    def do(self, directory: Path) -> None:
        """
        :param directory: where the state is saved.
        """
        self._save(directory, self.number)

    def lost(self, directory: Path, ended: int) -> str | None:
        """
        :param directory: where the save was interrupted.
        :param ended: how its process ended: by SIGKILL, with ``FAILED``, or with 0, by which it says that it has saved.
        :return: what was lost; None if nothing was, and the next save is as if there had been no interruption.
        """
        if ended != -signal.SIGKILL and (left := list(directory.glob(f"*{PARTIAL}"))):
            return f"{left[0].name} was left"
        old = self.before[-1] if self.before else None
        if (what := self._missing(directory, {self.number} if ended == 0 else {self.number, old})) is not None:
            return what
        self.do(directory)
        if (what := self._missing(directory, {self.number})) is not None:
            return what
        left = sorted(path.name for path in directory.iterdir())
        kept = sorted({*self.before, self.number})[-2:]
        expected = ["alone"] if self.alone else [*(f"{number:012d}" for number in kept), "best"]
        return None if left == expected else f"there are {left} in place of {expected}"

    def _save(self, directory: Path, number: int) -> None:
        state = small_state(number)
        if self.alone:
            checkpoint.save(directory / "alone", state)
        else:
            CheckpointHistory(directory).save(state, number, value=number)

    def _missing(self, directory: Path, allowed: set[int | None]) -> str | None:
        """What is wrong if the newest and the best should be of these; None among them: there may be none at all."""
        history = CheckpointHistory(directory)
        reads: dict[str, Callable[[], dict[str, Any]]] = {
            "newest": lambda: history.newest()[1],
            "best": lambda: checkpoint.load(history.best),
        }
        if self.alone:
            reads = {"only one": lambda: checkpoint.load(directory / "alone")}
        for which, read in reads.items():
            try:
                tree = read()
            except FileNotFoundError as error:
                if None not in allowed:
                    return str(error)
                continue
            except CheckpointError as error:
                return str(error)
            number = tree["counters"]["num_timesteps"]
            if number not in allowed or not same(tree, small_state(number)):
                return f"the {which} is {number}"
        return f"damaged are {history.damaged}" if history.damaged else None


SAVES = {
    "the first of a history": Save((), 1),
    "the third of a history that keeps two": Save((1, 2), 3),
    "one of a history once more": Save((1, 2), 2),
    "one in place of another": Save((1,), 2, alone=True),
}


def killed_at_every_call(work: Path, saves: Mapping[str, Save] = SAVES) -> dict[str, Any]:
    """Kill the process before every call by which Python, or safetensors, changes or lists files.

    :param work: a directory.
    :param saves: the saves that it comes in between.
    :return: the number of points, and what was lost at which of them.
    """
    lost, points = [], 0
    for name, save in saves.items():
        directory = work / name
        for point in itertools.count(1):
            save.prepare(directory)
            ended = _in_child(partial(_killed_at, point, partial(save.do, directory)))
            if ended == 0:
                break  # there are no more calls
            points += 1
            if ended != -signal.SIGKILL:
                lost.append(f"{name}, call {point}: the process ended with {ended}")
            elif what := save.lost(directory, ended):
                lost.append(f"{name}, call {point}: {what}")
    return {"points": points, "lost": lost}


def too_large_at_every_size(work: Path, step: int, saves: Mapping[str, Save] = SAVES) -> dict[str, Any]:
    """Let no file grow beyond a size, as on a full disk: every write beyond it fails.

    :param work: a directory.
    :param step: the sizes are multiples of it, in bytes.
    :param saves: the saves that it comes in between.
    :return: the number of sizes at which the save failed, and what was lost at which of them.
    """
    lost, failed = [], 0
    for name, save in saves.items():
        directory = work / name
        for size in itertools.count(0, step):
            save.prepare(directory)
            ended = _in_child(partial(_limited_to, size, partial(save.do, directory)))
            if ended == 0:
                break  # there is room for every file
            failed += 1
            if ended != FAILED:
                lost.append(f"{name}, {size} bytes: the process ended with {ended}")
            elif what := save.lost(directory, ended):
                lost.append(f"{name}, {size} bytes: {what}")
    return {"points": failed, "lost": lost}


# The system calls by which a save opens and changes files.
CHANGES = (
    *("openat", "write", "pwrite64", "copy_file_range", "sendfile", "ftruncate", "fsync", "close"),
    *("mkdir", "mkdirat", "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir"),
    *("chmod", "fchmod", "fchmodat"),
)
# Those of them that fail where a disk is full. So does openat where it makes a file; but strace can't tell that from
# openat where it reads, which goes on.
FAILS_WHEN_FULL = (
    *("write", "pwrite64", "copy_file_range", "sendfile", "ftruncate", "fsync", "mkdir", "mkdirat"),
    *("rename", "renameat", "renameat2", "link", "linkat"),
)


def at_every_system_call(work: Path, killed: bool) -> dict[str, Any]:
    """Kill the process before every call of ``CHANGES``, or let those of ``FAILS_WHEN_FULL`` fail from some point on.

    :param work: a directory.
    :param killed: kill it; otherwise the disk is full.
    :return: the number of points, and what was lost at which of them.
    :raises RuntimeError: if there is no ``strace``, which does this.
    """
    if shutil.which("strace") is None:
        raise RuntimeError("Expected the program strace, found none. Install it, or leave this part out.")
    lost, points = [], 0
    calls = CHANGES if killed else FAILS_WHEN_FULL
    for name, save in SAVES.items():
        directory = work / name
        save.prepare(directory)
        _, log = _traced(partial(save.do, directory), f"trace={','.join(calls)}")
        for call, times in Counter(line.split("(")[0].split()[-1] for line in log if "(" in line).items():
            for point in range(1, times + 1):
                fault = f"signal=SIGKILL:when={point}" if killed else f"error=ENOSPC:when={point}+"
                save.prepare(directory)
                ended, _ = _traced(partial(save.do, directory), f"inject={call}:{fault}")
                if killed and ended == 0:
                    break  # the process that was traced first made more of these calls: it imported modules
                points += 1
                # A copy replaces a hard link that fails, so the process may end well.
                if ended not in ((-signal.SIGKILL,) if killed else (FAILED, 0)):
                    lost.append(f"{name}, {call} {point}: the process ended with {ended}")
                elif what := save.lost(directory, ended):
                    lost.append(f"{name}, {call} {point}: {what}")
    return {"points": points, "lost": lost}


FAILED = 7  # the exit code of a child in which a save raised OSError


def _in_child(action: Callable[[], object], stopped: bool = False) -> int:
    """
    :param action: what a forked process does.
    :param stopped: it stops at first, and its process id is returned; otherwise it is waited for.
    :return: its exit code, negative for a signal.
    """
    child = os.fork()
    if child == 0:
        _act(action, stopped)
    if stopped:
        os.waitpid(child, os.WUNTRACED)
        return child
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _act(action: Callable[[], object], stopped: bool) -> NoReturn:
    code = 1
    try:
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        action()
        code = 0
    except OSError:
        code = FAILED
    finally:
        os._exit(code)


def _killed_at(point: int, action: Callable[[], object]) -> None:
    calls = 0

    def called(event: str, _: Any = None) -> None:
        nonlocal calls
        if event == "open" or event.startswith(("os.", "shutil.")):
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            called("os.call")
            return function(*args)

        return call

    # Neither of these two tells Python's audit hooks.
    os.fsync = watched(os.fsync)
    checkpoint.save_file = watched(checkpoint.save_file)
    sys.addaudithook(called)
    action()


def _limited_to(size: int, action: Callable[[], object]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    action()


def _traced(action: Callable[[], object], expression: str) -> tuple[int, list[str]]:
    """
    :param action: what a forked process does.
    :param expression: ``strace -e``.
    :return: the exit code of the process, and the lines that strace printed.
    """
    child = _in_child(action, stopped=True)
    tracer = subprocess.Popen(
        ["strace", "-qq", "-f", "-e", expression, "-p", str(child)], stderr=subprocess.PIPE, text=True
    )
    while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
        time.sleep(0.001)
    os.kill(child, signal.SIGCONT)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return ended, tracer.communicate()[1].splitlines()
