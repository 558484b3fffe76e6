"""``kvledger events``."""

from __future__ import annotations

from typing import Annotated

import typer

from kvledger.cli.debugging import errors, say
from kvledger.cli.exits import BAD_INPUT
from kvledger.cli.following import cannot_follow
from kvledger.cli.stopping import until_asked, until_signal
from kvledger.debugger.explain.wording import count

_EXTRA = "pip install 'kvledger[events]'"


def events(
    name: Annotated[str, typer.Argument(help="Name of a ledger on this machine")],
    endpoint: Annotated[str, typer.Option(help="ZeroMQ address to publish on")] = "tcp://127.0.0.1:5557",
    replay_endpoint: Annotated[
        str, typer.Option(help="ZeroMQ address that answers who has missed batches; empty: none")
    ] = "tcp://127.0.0.1:5558",
    topic: Annotated[str, typer.Option(help="First frame of each message, e.g. kv@POD@MODEL")] = "",
    rank: Annotated[int, typer.Option(min=0, help="Data-parallel rank of the engine")] = 0,
) -> None:
    """Publish KV events for routers: which blocks are cached on which tier, in vLLM's format over ZeroMQ.

    A batch per event of the log, numbered as the log is: restarts of the engine or of this command lose and double
    nothing. Runs until the ledger ends, or Ctrl-C. The batches hold the tokens of prompts: publish on addresses that
    routers alone can reach. Needs the extra *events*.
    """
    with until_asked():
        _publish(name, endpoint, replay_endpoint, topic, rank)


def _publish(name: str, endpoint: str, replay_endpoint: str, topic: str, rank: int) -> None:
    from ipc import LedgerError
    from statemachine.errors import Contradiction

    try:
        import zmq

        from workers.followers.events import Publisher
    except ModuleNotFoundError as error:
        say("error", f"{error}: {_EXTRA}")
        raise typer.Exit(BAD_INPUT) from error
    publisher = None
    try:
        publisher = Publisher(name, endpoint, replay_endpoint=replay_endpoint, topic=topic, rank=rank)
        with until_signal() as stopped, errors.status("") as status:
            while not stopped():
                if not publisher.step(0.05) and publisher.ended():
                    break
                status.update(f"batch {publisher.published:,} on {endpoint}")
    except zmq.ZMQError as error:
        say("error", error)
        raise typer.Exit(BAD_INPUT) from error
    except Contradiction as error:
        say("error", f"{error}: what comes after it cannot be published; kvledger check shows more")
        raise typer.Exit(BAD_INPUT) from error
    except (LedgerError, OSError) as error:
        say("error", cannot_follow(name, error) if isinstance(error, LedgerError) else error)
        raise typer.Exit(BAD_INPUT) from error
    finally:
        if publisher is not None:
            publisher.close()
    print(f"{publisher.published:,} batches published, {count(publisher.answered, 'request')} for missed ones answered")
