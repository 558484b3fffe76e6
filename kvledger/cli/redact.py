"""``kvledger redact``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvledger.cli.exits import BAD_INPUT, FAILED, CommandFailed
from kvledger.cli.ledgers import is_ledger
from kvledger.cli.sources import note_damage
from kvledger.cli.terminal import line, say, working
from kvledger.debugger.explain.wording import count


def redact(
    source: Annotated[Path, typer.Argument(help="The recording", metavar="IN.kvlog")],
    target: Annotated[Path, typer.Argument(help="File to write; it must not exist", metavar="OUT.kvlog")],
    key_file: Annotated[
        Path | None,
        typer.Option(help="Key of the pseudonyms, made if there is no such file; default: a key that nobody keeps"),
    ] = None,
) -> None:
    """Rewrite a recording without prompts, request names and namespaces; all structure stays, so it can be handed on.

    With the same key file, equal prompts in several recordings stay equal. Keep the key to yourself: it tests guesses.
    A recording that is damaged or cut off is rewritten up to there, without what is intact behind, and the exit code is
    2; one that contradicts itself is rewritten to its end, and the exit code is 1.
    """
    import secrets

    from kvledger.recordings.redaction import KEY_BYTES, read_key
    from kvledger.recordings.redaction import redact as write

    if is_ledger(str(source)):
        how = f"record it first (kvledger record {source} FILE.kvlog)"
        raise CommandFailed(f"{source} is a ledger, not a recording: {how}")
    key = secrets.token_bytes(KEY_BYTES) if key_file is None else read_key(key_file)
    with working(f"redacting {source.name}"):
        done = write(source, target, key)
    if done.damage:
        note_damage(done.damage)
    line(f"{count(done.events, 'event')} in {target}")
    if done.broken:
        say("FAILED", f"{source} contradicts itself; from there on equal prompts are not recognised: {done.broken}")
        raise typer.Exit(FAILED)
    if done.damage:
        raise typer.Exit(BAD_INPUT)
