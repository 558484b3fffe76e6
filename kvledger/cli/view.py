"""``kvledger view``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from kvledger.cli.interrupts import until_asked
from kvledger.cli.sources import At, From, Src, To, reading
from kvledger.cli.terminal import flush, line
from kvledger.debugger import SourceError
from kvledger.debugger.source.places import locate
from kvledger.view.log import Log


def view(
    src: Src = None,
    at: At = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Listen on this port; 0 = any free one")] = 0,
    words: Annotated[bool, typer.Option("--words", help="Let the page show token ids (users' prompts)")] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one HTML file (must not exist) and serve nothing")
    ] = None,
    start: From = None,
    stop: To = None,
) -> None:
    """Show a log as a page in your browser: block map, prefix tree and events, forwards and backwards.

    The page is served on 127.0.0.1 only, under an address with a secret, and changes nothing. Prompts stay hidden.
    With --export it becomes a file that needs no server: the last 5,000 events, or --from ... --to.
    """
    with until_asked(export is None), reading(src) as (source, _):
        if export is None and (start is not None or stop is not None):
            raise SourceError("--from and --to go with --export FILE: the page itself shows all events")
        if export is not None and (words or at is not None):
            raise SourceError("--words and --at are for the page itself: an exported file holds no prompts")
        with contextlib.closing(Log(source, words=words)) as log:
            log.prepare()
            if export is not None:
                first, last = (None if text is None else locate(source, text) for text in (start, stop))
                _export(log, export, first, last)
            else:
                _serve(log, port, "" if at is None else f"#at={min(locate(source, at), log.last)}")


def _export(log: Log, path: Path, start: int | None, stop: int | None) -> None:
    from kvledger.view.export import export

    first, last = export(log, path, start, stop)
    line(f"{path}: events {first:,} to {last:,}, {path.stat().st_size / 1e6:.1f} MB, opens in any browser")


def _serve(log: Log, port: int, fragment: str) -> None:
    from kvledger.view.server import ViewServer

    try:
        server = ViewServer(log, port)
    except OSError as error:
        why = f"cannot listen on port {port} ({error.strerror}): leave --port out to get a free one"
        raise SourceError(why) from error
    with server:
        line(server.url + fragment)
        line("Open this address on this machine; it stays valid until Ctrl-C ends this command.")
        flush()
        server.serve_forever()
