"""``python -m examples.quickstart.engine NAME``: an engine that answers questions until it is stopped.

Started again after it was killed, it goes on with the cache that the dead process has left.
"""

from __future__ import annotations

import os
import sys
import time

from examples.quickstart.model import CONFIG, SmallModel
from examples.scheduler.scheduler import Request, Scheduler
from kvledger import CacheManager

INSTRUCTIONS = "You are a helpful assistant. Answer in one short sentence, and say so where you do not know. "
QUESTIONS = ("What is a block?", "Where do tokens live?", "Who evicts whom?", "Is anybody there?")
PAUSE_S = 0.2


def main(name: str) -> None:
    """Serve until Ctrl-C: only then the ledger is removed."""
    started = CacheManager.open_or_create(name, CONFIG)
    with started.manager as manager:
        scheduler = Scheduler(manager, SmallModel(manager))
        say(f"engine {os.getpid()} starts {'warm' if started.warm else 'cold'}")
        number = 0
        while True:
            number += 1
            question = QUESTIONS[number % len(QUESTIONS)]
            request = Request(f"{os.getpid()}-{number}", [*(INSTRUCTIONS + question).encode()], length=24)
            prompt = len(request.tokens)
            cached = sum(manager.peek(request.tokens)) * CONFIG.block_size
            scheduler.submit(request)
            while not request.done.is_set():
                scheduler.step()
            answer = bytes(request.tokens[prompt:]).decode()
            say(f"{request.id}: {cached} of {prompt} tokens cached: {question} {answer}")
            time.sleep(PAUSE_S)


def say(line: str) -> None:
    """Print a line at once, for whoever reads it through a pipe."""
    print(line, flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        say("the engine has stopped, and removed its ledger")
