"""The root of the command line: however a command ends, it is told in one line and by one of the exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from kvledger.cli.exits import BAD_INPUT, BUG, FAILED, INTERRUPTED, OK, CommandFailed
from kvledger.text import printable_json


class Commands(TyperGroup):
    """All commands. No error leaves it: each becomes a line, and with ``--json`` an object as well."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run a command and end the process with its exit code."""
        given = sys.argv[1:] if args is None else list(args)
        try:
            ended = super().main(given, *rest, **{**options, "standalone_mode": False})
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            sys.exit(_ended(error, "--json" in given))
        except SystemExit as ended_by:  # rich ends the process where nobody reads its tables
            if isinstance(ended_by.__context__, BrokenPipeError):
                _mute()
                sys.exit(OK)
            raise
        sys.exit(ended if isinstance(ended, int) else OK)


def _ended(error: BaseException, as_json: bool) -> int:
    """Say why a command ended, and return its exit code."""
    from kvledger.cli.terminal import line, note, say

    if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
        _mute()
        return OK
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    code, message = _meaning(error)
    if code == BUG:
        for text in "".join(traceback.format_exception(error)).splitlines():
            note(text)
    if not (isinstance(error, CommandFailed) and error.told):
        say("FAILED" if code == FAILED else "error", message)
    if as_json:
        line(printable_json({"error": message, "exit_code": code}))
    return code


def _meaning(error: BaseException) -> tuple[int, str]:
    """The exit code and the line of an error."""
    from ipc import LedgerError
    from kvledger.config import ConfigError
    from kvledger.debugger import SourceError
    from kvledger.run.pattern import WrongBytes
    from kvledger.run.traces import TraceError
    from statemachine.errors import CommandRejected, Contradiction, InvariantViolation
    from workers import WorkerFailed

    if isinstance(error, CommandFailed):
        return error.code, str(error)
    if hasattr(error, "format_message"):  # it was typed wrongly
        context = getattr(error, "ctx", None)
        hint = f" ({context.command_path} --help)" if context is not None else ""
        return BAD_INPUT, f"{error.format_message()}{hint}"
    if isinstance(error, Contradiction):
        where = f"nothing after event {error.sequence - 1} has a state (kvledger check shows more)"
        return FAILED, f"{error}; {where}"
    if isinstance(error, WrongBytes | InvariantViolation):
        return FAILED, str(error)
    if isinstance(error, SourceError | LedgerError | OSError | ConfigError | TraceError | CommandRejected):
        return BAD_INPUT, str(error)
    if isinstance(error, WorkerFailed):
        return BAD_INPUT, str(error)
    return BUG, "this is a fault of kvledger, not of what you typed: please report it with the lines above"


def _mute() -> None:
    """Send what is still to be printed nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
