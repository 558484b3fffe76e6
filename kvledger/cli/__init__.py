"""The command line: one module per command or small family of commands, all registered here.

Rules:

* A command parses, calls one thing in the package behind it, and prints. Nothing is decided here.
* Errors are one line that says what to do; exit codes mean the same everywhere (:mod:`.exits`).

Words: ``docs/glossary.md``.
"""

import sys
from importlib import metadata
from typing import Annotated

import typer

from kvledger.cli.doctor import doctor
from kvledger.cli.exits import BAD_INPUT
from kvledger.cli.group import Commands
from kvledger.cli.terminal import line, say

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
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
    app.command()(run)
    app.command()(segments)
    app.command("size")(size_command)
    app.command()(simulate)
    app.command()(audit)
    app.command()(record)
    app.command()(redact)
    app.command()(metrics)
    app.command()(spans)
    app.command()(events)
    app.command()(pushes)
    for command in (log, show, check, bisect, diff, replay, what_if, export, top, view):
        app.command(rich_help_panel="Debugger")(command)
    app.command("explain", rich_help_panel="Debugger")(explain_command)
    app.command("leaks", rich_help_panel="Debugger")(leaks_command)
    app.command("shrink", rich_help_panel="Debugger")(shrink_command)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        line(f"kvledger {metadata.version('kvledger')}, {'compiled' if is_compiled() else 'interpreted'}")
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
