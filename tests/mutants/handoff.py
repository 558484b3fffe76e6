"""Faults in handing requests over: sender, receiver, pushers, tickets."""

from __future__ import annotations

from tests.mutants import Mutant, mutant

TESTS = "tests/handoff/test_pusher.py"
TAKEN_BACK = "tests/handoff/test_handing_over.py::test_blocks_that_were_taken_back_are_written_by_nobody"
WRITTEN = "tests/handoff/test_handing_over.py::test_only_what_is_written_is_sent"

MUTANTS: list[Mutant] = [
    mutant(
        "a pusher looks before its claim is visible",
        "workers/handoff/tickets.py",
        "        self._fence()\n        return 0 < slot",
        "        return 0 < slot",
        TAKEN_BACK,
    ),
    mutant(
        "a decode instance looks at the claims before its revocation is visible",
        "workers/handoff/tickets.py",
        "        self._words[slot] &= ~1\n        self._fence()\n\n    def free",
        "        self._words[slot] &= ~1\n\n    def free",
        f"{TAKEN_BACK}[Order.WEAK]",
    ),
    mutant(
        "the claim of a dead pusher counts",
        "workers/handoff/tickets.py",
        "in tickets and may_live(signals):\n",
        "in tickets:\n",
        TAKEN_BACK,
    ),
    mutant(
        "a claim is given up before what was copied is visible",
        "workers/handoff/shared_memory.py",
        "        finally:\n            self._release()\n            self._acquire()\n",
        "        finally:\n",
        f"{TAKEN_BACK}[Order.WEAK]",
    ),
    mutant(
        "a layer is said to be written before it is visible",
        "workers/handoff/progress.py",
        "        self._release()\n        self._acquire()\n        self._signals.words[0] = word",
        "        self._signals.words[0] = word",
        f"{WRITTEN}[Order.WEAK]",
    ),
    mutant(
        "a layer is read without a fence after it is said to be written",
        "workers/handoff/progress.py",
        "        self._release()\n        self._acquire()\n        return there",
        "        return there",
        f"{WRITTEN}[Order.WEAK]",
    ),
    mutant(
        "a revoked ticket is good enough",
        "workers/handoff/tickets.py",
        "return 0 < slot < _WORDS and ticket & 1 == 1 and self._words[slot] == ticket",
        "return True",
        f"{TESTS}::test_a_revoked_ticket_is_refused_whatever_the_pusher_is_told",
    ),
    mutant(
        "a pusher looks before it claims",
        "workers/handoff/shared_memory.py",
        "        self._claims[CLAIM] = push.ticket\n",
        "",
        f"{TESTS}::test_a_pusher_claims_before_it_looks_and_lets_go_after",
    ),
    mutant(
        "a pusher never gives its claim up",
        "workers/handoff/shared_memory.py",
        "            self._claims[CLAIM] = 0\n",
        "",
        f"{TESTS}::test_a_pusher_claims_before_it_looks_and_lets_go_after",
    ),
    mutant(
        "nobody asks who still writes",
        "kvledger/handoff/receiver.py",
        "        writing = claimed(self._quarantined)\n",
        "        writing: dict[int, int] = {}\n",
        f"{TESTS}::test_a_claimed_room_stays_quarantined_until_its_writer_lets_go",
    ),
    mutant(
        "a successor does not ask who still writes",
        "kvledger/manager/lifecycle.py",
        "        end_receiving(name)  # nothing becomes free while somebody else may still write it\n",
        "",
        f"{TESTS}::test_a_successor_waits_for_who_still_writes_into_its_pool",
    ),
    mutant(
        "what cannot be looked at is not received",
        "kvledger/manager/handoffs.py",
        "    except LedgerNotFound:\n",
        "    except LedgerError:\n",
        f"{TESTS}::test_a_board_that_cannot_be_looked_at_is_not_taken_for_none",
    ),
    mutant(
        "layers go before they are written",
        "workers/handoff/pusher.py",
        "return not push.order.step or self._progress.reached(push.order.step, push.layers + 1)",
        "return True",
        f"{TESTS}::test_layer_by_layer_as_they_are_written",
    ),
    mutant(
        "a release does not end its pushes",
        "kvledger/manager/execution.py",
        "            handoff.released(request_id)\n",
        "            pass\n",
        f"{TESTS}::test_releasing_a_request_ends_its_push",
    ),
    mutant(
        "a push counts as arrived when one rank has sent it",
        "kvledger/handoff/sender.py",
        "            elif len(push.answers) == self._config.ranks:\n",
        "            elif push.answers:\n",
        f"{TESTS}::test_what_a_dead_pusher_had_answered_counts_no_more",
    ),
    mutant(
        "what a dead pusher had answered still counts",
        "kvledger/handoff/sender.py",
        "                push.answers.pop(rank, None)\n",
        "                pass\n",
        f"{TESTS}::test_what_a_dead_pusher_had_answered_counts_no_more",
    ),
    mutant(
        "a pusher goes on with what is over",
        "workers/handoff/pusher.py",
        "                self._pushes.pop(fact.push, None)\n",
        "                pass\n",
        f"{TESTS}::test_a_pusher_forgets_what_is_over",
    ),
    mutant(
        "a pool of the same name is the same pool",
        "workers/handoff/pusher.py",
        "key = order.peer, order.board, order.pools",
        'key = order.peer, order.board, ""',
        f"{TESTS}::test_a_request_is_handed_over_and_every_byte_is_there",
        f"{TESTS}::test_another_pool_is_refused_by_the_pusher",
    ),
]
