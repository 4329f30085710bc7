"""Two processes that take turns: each runs one iteration when it is told to, and sleeps while the other runs.

The child's half is ``Turns``, the benchmark's is ``Child``. One line of JSON a turn.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def resident_bytes() -> tuple[int, int]:
    """
    :return: resident memory of this process now, and at its peak.
    """
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux: the peak stands for both
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak
    # Not ru_maxrss: it begins with what the parent process held when it forked.
    fields = {line.split(":")[0]: line.split()[1] for line in status.read_text().splitlines() if line.startswith("Vm")}
    return int(fields["VmRSS"]) * 1024, int(fields["VmHWM"]) * 1024


class Turns:
    """The child's half. Make it right after the imports: memory counts from there."""

    def __init__(self) -> None:
        self._baseline, _ = resident_bytes()
        # What libraries print must not get between the lines of JSON.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._start = 0.0

    def wait(self) -> None:
        """Sleep until it is our turn; leave the process when there will be none."""
        if sys.stdin.readline().strip() != "go":
            raise SystemExit
        self._start = time.perf_counter()

    def done(self, **more: Any) -> None:
        """Report this turn.

        :param more: whatever else the benchmark should record.
        """
        seconds = time.perf_counter() - self._start
        _, peak = resident_bytes()
        print(json.dumps({"seconds": seconds, "peak_bytes": peak - self._baseline, **more}), file=self._out)


class Child:
    """The benchmark's half.

    :param command: of the process.
    :param directory: where it runs.
    """

    def __init__(self, command: list[str], directory: Path) -> None:
        self._command = command
        # Not a pipe: nobody reads it between the turns, and a child that has filled one waits for ever.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it is there as long as the child)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=directory
        )

    def turn(self) -> dict[str, Any]:
        """
        :return: what the child says of one iteration.
        :raises RuntimeError: with its last words, if it died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            with self._errors:
                self._errors.seek(0)
                errors = self._errors.read().decode(errors="replace")
            raise RuntimeError(f"{' '.join(self._command)} ended early:\n{errors[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """Tell it that there are no more turns, and wait for its end."""
        self._process.communicate("stop\n")
        self._errors.close()
