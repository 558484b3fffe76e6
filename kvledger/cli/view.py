"""``kvledger view``."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ipc import LedgerError
from kvledger.cli.exits import BAD_INPUT, INTERRUPTED
from kvledger.debugger import SourceError, open_source
from kvledger.view.log import Log
from statemachine.errors import InvariantViolation


def view(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A .kvlog file, or the name of a ledger")],
    at: Annotated[
        str | None, typer.Option(help="Show this first: an event, step:N, or a time in UTC; default: the last event")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Listen on this port; 0 = any free one")] = 0,
    words: Annotated[bool, typer.Option("--words", help="Let the page show token ids (users' prompts)")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write one self-contained HTML file (must not exist) and serve nothing")
    ] = None,
    start: Annotated[int | None, typer.Option("--from", min=1, help="With --export: its first event")] = None,
    stop: Annotated[int | None, typer.Option("--to", min=1, help="With --export: its last event")] = None,
) -> None:
    """Show a log as a page in your browser: block map, prefix tree and events, forwards and backwards.

    The page is served on 127.0.0.1 only, under an address with a secret, and changes nothing. Prompts stay hidden.
    """
    errors = Console(stderr=True)
    try:
        if export is None and (start is not None or stop is not None):
            raise SourceError("--from and --to go with --export FILE: the page itself shows all events")
        if export is not None and words:
            raise SourceError("--words and --export do not go together: an exported file never holds prompts")
        with _open(source, words, errors) as log:
            if export is not None:
                _export(log, export, start, stop)
            else:
                _serve(log, port, at)
    except (SourceError, LedgerError, InvariantViolation) as error:
        # the text may hold anything, square brackets too: it is no markup
        errors.print("[bold red]error[/]", Text(str(error)), soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _open(source: str, words: bool, console: Console) -> Log:
    """Open it; the first time that takes a while, and says so."""
    columns = TextColumn("reading"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None)
        opened = open_source(source, lambda done, total: progress.update(task, completed=done, total=total))
        log = Log(opened, words=words)
        try:
            log.prepare()
        except BaseException:
            log.close()
            raise
        return log


def _export(log: Log, path: Path, start: int | None, stop: int | None) -> None:
    from kvledger.view.export import export

    first, last = export(log, path, start, stop)
    print(f"{path}: events {first:,} to {last:,}, {path.stat().st_size / 1e6:.1f} MB, opens in any browser")


def _serve(log: Log, port: int, at: str | None) -> None:
    from kvledger.view.server import ViewServer

    fragment = "" if at is None else f"#at={log.place(at)}"
    try:
        server = ViewServer(log, port)
    except OSError as error:
        why = f"cannot listen on port {port} ({error.strerror}): leave --port out to get a free one"
        raise SourceError(why) from error
    with server, contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(server.url + fragment, flush=True)
        print("Open this address on this machine; it stays valid until Ctrl-C ends this command.", flush=True)
        server.serve_forever()
