"""``kvledger redact``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvledger.cli.debugging import errors, note_damage, say
from kvledger.cli.exits import BAD_INPUT
from kvledger.cli.following import is_ledger
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
    Of a recording that is damaged or cut off what can be read is rewritten, and the exit code is 2.
    """
    import secrets

    from ipc import LedgerError
    from kvledger.recordings.redaction import KEY_BYTES, read_key
    from kvledger.recordings.redaction import redact as write

    if is_ledger(str(source)):
        say("error", f"{source} is a ledger, not a recording: record it first (kvledger record {source} FILE.kvlog)")
        raise typer.Exit(BAD_INPUT)
    try:
        key = secrets.token_bytes(KEY_BYTES) if key_file is None else read_key(key_file)
        with errors.status(f"redacting {source.name}"):
            done = write(source, target, key)
    except LedgerError as error:
        say("error", error)
        raise typer.Exit(BAD_INPUT) from error
    if done.damage:
        note_damage(done.damage)
    if done.broken:
        errors.print(f"from its first broken event on, equal prompts are not recognised any more: {done.broken}")
    print(f"{count(done.events, 'event')} in {target}")
    if done.damage:
        raise typer.Exit(BAD_INPUT)
