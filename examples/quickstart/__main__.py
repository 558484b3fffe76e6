"""``python -m examples.quickstart``: what docs/quickstart.md tells to type, by itself, in a quarter of a minute."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import NamedTuple

ANSWERS = 8


class Engine(NamedTuple):
    """An engine in a process of its own, and what it has said when its first answers were there."""

    process: subprocess.Popen[str]
    said: list[str]


def start_engine(name: str, answers: int = ANSWERS) -> Engine:
    """Start the engine of this example on a ledger, print what it says, and return after so many answers.

    Raises:
        RuntimeError: it ended before.
    """
    command = [sys.executable, "-m", "examples.quickstart.engine", name]
    print("$", "python", *command[1:])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said: list[str] = []
    while len(said) <= answers:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine has ended with status {process.wait()}")
        print(line, end="")
        said.append(line.rstrip("\n"))
    return Engine(process, said)


def kill(engine: Engine) -> None:
    """Kill an engine as the kernel does when memory runs out: it does nothing more."""
    print(f"$ kill -9 {engine.process.pid}")
    _end(engine, signal.SIGKILL)


def stop(engine: Engine) -> None:
    """Let an engine end, as Ctrl-C does: it removes its ledger."""
    print(f"$ kill -INT {engine.process.pid}")
    _end(engine, signal.SIGINT)


def _end(engine: Engine, how: signal.Signals) -> None:
    assert engine.process.stdout is not None
    engine.process.send_signal(how)
    engine.process.wait()
    engine.process.stdout.close()


def kvledger(*arguments: str) -> str:
    """Run ``kvledger`` with these arguments; returns what it printed, after printing it.

    Raises:
        subprocess.CalledProcessError: it has failed.
    """
    print("$ kvledger", *arguments)
    command = [sys.executable, "-m", "kvledger.cli", *arguments]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(printed)
    return printed


def last_request(engine: Engine) -> str:
    """The name of the last request that an engine has answered."""
    return engine.said[-1].partition(":")[0]


def main() -> int:
    """Serve, look, kill, serve again, explain. Returns 1 where the second engine did not go on with what was there."""
    name = f"quickstart-{os.getpid()}"
    cold = start_engine(name)
    try:
        kvledger("top", name, "--once")
    finally:
        kill(cold)
    warm = start_engine(name)
    try:
        kvledger("explain", name, "request", last_request(cold))
    finally:
        stop(warm)
    same = answers(warm) == answers(cold)
    print(f"The answers after the crash are {'those from before' if same else 'OTHERS: that is a defect'}.")
    return 0 if same and warm.said[0].endswith("warm") else 1


def answers(engine: Engine) -> list[str]:
    """What an engine has answered, without the names of the requests and what was cached."""
    return [line.split(": ", 2)[2] for line in engine.said[1:]]


if __name__ == "__main__":
    sys.exit(main())
