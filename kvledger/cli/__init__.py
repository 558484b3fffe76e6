"""The command line: one module per command or small family of commands, all registered here.

Rules:

* A command parses, calls one thing in the package behind it, and prints. Nothing is decided here.
* Errors are one line that says what to do; exit codes mean the same everywhere (:mod:`.exits`).

Words: ``docs/glossary.md``.
"""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from kvledger import __version__
from kvledger.cli.doctor import doctor
from kvledger.cli.examples import epilog
from kvledger.cli.exits import BAD_INPUT
from kvledger.cli.group import Commands
from kvledger.cli.terminal import line, say

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="The KV-block manager of an LLM serving engine, as an event-sourced state machine.\n\n"
    "Exit codes:\n\n"
    "- 0: done, and the answer is yes. What follows a ledger (audit, record, metrics, spans, events, view, top, "
    "log -f) also ends with 0 when it is asked to, by Ctrl-C or SIGTERM.\n"
    "- 1: the answer is no: wrong bytes, a broken invariant, a log that contradicts itself, a difference, nothing "
    "found.\n"
    "- 2: bad input, a damaged recording, or no resources.\n"
    "- 70: a fault of kvledger itself.\n"
    "- 130: interrupted before the end.",
)
_broken: ImportError | None = None
try:
    from kvledger import is_compiled
    from kvledger.cli.audit import audit
    from kvledger.cli.check import bisect, check, leaks_command
    from kvledger.cli.events import events
    from kvledger.cli.explain import explain_command
    from kvledger.cli.export import export
    from kvledger.cli.log import log
    from kvledger.cli.metrics import metrics
    from kvledger.cli.misses import misses
    from kvledger.cli.pushes import pushes
    from kvledger.cli.record import record
    from kvledger.cli.redact import redact
    from kvledger.cli.replay import diff, replay, shrink_command
    from kvledger.cli.run import run
    from kvledger.cli.segments import segments
    from kvledger.cli.show import show
    from kvledger.cli.simulate import simulate
    from kvledger.cli.size import size_command
    from kvledger.cli.spans import spans
    from kvledger.cli.top import top
    from kvledger.cli.view import view
    from kvledger.cli.what_if import what_if
except ImportError as error:  # the installation is not whole: there is the doctor alone, which says why
    _broken = error
else:
    _commands: dict[str, Callable[..., None]] = {
        "run": run,
        "segments": segments,
        "size": size_command,
        "simulate": simulate,
        "audit": audit,
        "record": record,
        "redact": redact,
        "metrics": metrics,
        "spans": spans,
        "events": events,
        "pushes": pushes,
    }
    _debugger: dict[str, Callable[..., None]] = {
        "log": log,
        "show": show,
        "check": check,
        "bisect": bisect,
        "diff": diff,
        "replay": replay,
        "what-if": what_if,
        "export": export,
        "top": top,
        "view": view,
        "explain": explain_command,
        "leaks": leaks_command,
        "misses": misses,
        "shrink": shrink_command,
    }
    for _name, _command in _commands.items():
        app.command(_name, epilog=epilog(_name))(_command)
    for _name, _command in _debugger.items():
        app.command(_name, rich_help_panel="Debugger", epilog=epilog(_name))(_command)
app.command("doctor", epilog=epilog("doctor"))(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        line(f"kvledger {__version__}, {'compiled' if is_compiled() else 'interpreted'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version, and whether it is compiled."
        ),
    ] = False,
) -> None:
    """What holds for all commands."""


def main() -> None:
    """Entry point of the ``kvledger`` command."""
    if _broken is not None and sys.argv[1:2] != ["doctor"]:
        say("error", f"kvledger is not whole here ({_broken}): run kvledger doctor")
        sys.exit(BAD_INPUT)
    app()
