"""``kvledger events``."""

from __future__ import annotations

from typing import Annotated

import typer

from kvledger.cli.exits import FAILED, CommandFailed
from kvledger.cli.interrupts import until_asked, until_signal
from kvledger.cli.ledgers import Name, cannot_follow, the_one
from kvledger.cli.terminal import line, working
from kvledger.debugger.explain.wording import count

_EXTRA = "pip install 'kvledger[events]'"


def events(
    name: Name = None,
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
    routers alone can reach. Exit code 1: the ledger contradicts itself. Needs the extra *events*.
    """
    with until_asked():
        _publish(the_one(name), endpoint, replay_endpoint, topic, rank)


def _publish(name: str, endpoint: str, replay_endpoint: str, topic: str, rank: int) -> None:
    from ipc import LedgerError
    from statemachine.errors import Contradiction

    try:
        import zmq

        from workers.followers.events import Publisher
    except ModuleNotFoundError as error:
        raise CommandFailed(f"{error}: {_EXTRA}") from error
    publisher = None
    try:
        publisher = Publisher(name, endpoint, replay_endpoint=replay_endpoint, topic=topic, rank=rank)
        with until_signal() as stopped, working("") as say_now:
            while not stopped():
                if not publisher.step(0.05) and publisher.ended():
                    break
                say_now(f"batch {publisher.published:,} on {endpoint}")
    except zmq.ZMQError as error:
        raise CommandFailed(error) from error
    except Contradiction as error:
        what = "what comes after it cannot be published; kvledger check shows more"
        raise CommandFailed(f"{name} contradicts itself, {what}: {error}", FAILED) from error
    except (LedgerError, OSError) as error:
        raise CommandFailed(cannot_follow(name, error) if isinstance(error, LedgerError) else error) from error
    finally:
        if publisher is not None:
            publisher.close()
    line(f"{publisher.published:,} batches published, {count(publisher.answered, 'request')} for missed ones answered")
