"""The command line: one module per command or small family of commands, all registered here."""

import typer

from kvledger.cli.run import run
from kvledger.cli.segments import segments
from kvledger.cli.simulate import simulate

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The KV-block manager of an LLM serving engine, as an event-sourced state machine.\n\n"
    "Exit codes: 0 done, 1 something is wrong with the cache (bytes, digest, invariant), 2 bad input or no resources, "
    "130 interrupted.",
)


app.command()(run)
app.command()(segments)
app.command()(simulate)


def main() -> None:
    """Entry point of the ``kvledger`` command."""
    app()
