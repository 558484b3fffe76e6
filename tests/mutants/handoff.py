"""Faults in handing requests over: sender, receiver, messagers, tickets."""

from __future__ import annotations

from tests.mutants import Mutant, mutant

TESTS = "tests/test_messager.py"

MUTANTS: list[Mutant] = [
    mutant(
        "a revoked ticket is good enough",
        "workers/tickets.py",
        "return 0 < slot < _WORDS and ticket & 1 == 1 and self._words[slot] == ticket",
        "return True",
        f"{TESTS}::test_a_revoked_ticket_is_refused_whatever_the_messager_is_told",
    ),
    mutant(
        "a messager looks before it claims",
        "workers/transport.py",
        "        self._claims[CLAIM] = push.ticket\n",
        "",
        f"{TESTS}::test_a_messager_claims_before_it_looks_and_lets_go_after",
    ),
    mutant(
        "a messager never gives its claim up",
        "workers/transport.py",
        "            self._claims[CLAIM] = 0\n",
        "",
        f"{TESTS}::test_a_messager_claims_before_it_looks_and_lets_go_after",
    ),
    mutant(
        "nobody asks who still writes",
        "kvledger/receiving.py",
        "        writing = claimed(self._quarantined)\n",
        "        writing: dict[int, int] = {}\n",
        f"{TESTS}::test_a_claimed_room_stays_quarantined_until_its_writer_lets_go",
    ),
    mutant(
        "a successor does not ask who still writes",
        "kvledger/manager.py",
        "            end_receiving(name)  # nothing becomes free while somebody else may still write it\n",
        "",
        f"{TESTS}::test_a_successor_waits_for_who_still_writes_into_its_pool",
    ),
    mutant(
        "layers go before they are written",
        "workers/messager.py",
        "return not push.order.step or self._progress.reached(push.order.step, push.layers + 1)",
        "return True",
        f"{TESTS}::test_layer_by_layer_as_they_are_written",
    ),
    mutant(
        "a release does not end its pushes",
        "kvledger/manager.py",
        "            handoff.released(key)\n",
        "            pass\n",
        f"{TESTS}::test_releasing_a_request_ends_its_push",
    ),
    mutant(
        "a push counts as arrived when one rank has sent it",
        "kvledger/sending.py",
        "            elif len(push.answers) == self._config.ranks:\n",
        "            elif push.answers:\n",
        f"{TESTS}::test_what_a_dead_messager_had_answered_counts_no_more",
    ),
    mutant(
        "what a dead messager had answered still counts",
        "kvledger/sending.py",
        "                push.answers.pop(rank, None)\n",
        "                pass\n",
        f"{TESTS}::test_what_a_dead_messager_had_answered_counts_no_more",
    ),
    mutant(
        "a messager goes on with what is over",
        "workers/messager.py",
        "                self._pushes.pop(fact.push, None)\n",
        "                pass\n",
        f"{TESTS}::test_a_messager_forgets_what_is_over",
    ),
    mutant(
        "a pool of the same name is the same pool",
        "workers/messager.py",
        "key = order.peer, order.board, order.pools",
        'key = order.peer, order.board, ""',
        f"{TESTS}::test_a_request_is_handed_over_and_every_byte_is_there",
        f"{TESTS}::test_another_pool_is_refused_by_the_messager",
    ),
]
