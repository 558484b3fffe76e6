"""Faults in the manager, the ranks and the workers."""

from __future__ import annotations

from tests.mutants import Edit, Mutant, mutant
from tests.mutants.log import SEEDS

MANAGER = "tests/manager/test_manager.py"
CHECKSUMS = "tests/workers/test_checksums.py"
INTERRUPTED = "tests/manager/test_interrupted.py"
FAILING = "tests/workers/test_failing_workers.py"
RECOVERY = "tests/manager/test_recovery.py"

API = "tests/manager/test_engine_api.py"
WHOLE = "tests/handoff/test_handing_over.py::test_a_pool_is_whole_or_not_there[Order.WEAK]"

MUTANTS: list[Mutant] = [
    mutant(
        "a copy out is done again after a later copy has written into its sources",
        "kvledger/manager/ranks.py",
        "            self._give_up_overtaken(answered | change.answered)\n",
        "            pass\n",
        f"{FAILING}::test_what_a_later_copy_has_overwritten_is_not_copied_again[engine lives]",
    ),
    mutant(
        "what a worker answered last is not heard when it is dead",
        "workers/processes/supervisor.py",
        "        answered = self._last_answers(worker)\n",
        "        answered = frozenset[int]()\n",
        "tests/workers/test_failing_workers.py::test_what_a_later_copy_has_overwritten_is_not_copied_again"
        "[engine lives, and has not heard]",
    ),
    mutant(
        "only what a GPU's worker had answered counts as begun",
        "kvledger/manager/ranks.py",
        " or self._config.layout.on_gpu:",
        ":",
        "tests/workers/test_failing_workers.py::test_what_a_later_copy_has_overwritten_is_not_copied_again"
        "[a GPU, which had not answered]",
    ),
    mutant(
        "a new engine has it done again after a later copy has written into its sources",
        "kvledger/manager/ranks.py",
        "            self._give_up_overtaken(self._state.transfers)\n            self._never_again(rank)\n",
        "            self._never_again(rank)\n",
        f"{FAILING}::test_what_a_later_copy_has_overwritten_is_not_copied_again[engine dies, too]",
    ),
    mutant(
        "a back-up that cannot be logged fails the call that was",
        "kvledger/manager/execution.py",
        "        except SharedMemoryFull:\n            pass  # the log's writer",
        "        except SharedMemoryFull:\n            raise  # the log's writer",
        f"{API}::test_a_backup_that_cannot_be_logged_fails_no_call_that_was",
    ),
    mutant(
        "a full shared memory stops the release of what was cached ahead",
        "kvledger/manager/transactions.py",
        "    BlocksComputed,  # a release begins with it\n",
        "",
        f"{API}::test_what_was_cached_ahead_is_released_without_room_for_more_log",
    ),
    mutant(
        "the answer of one rank is taken for all",
        "kvledger/manager/ranks.py",
        "            if len(answers) == self._config.ranks:\n",
        "            if answers:\n",
        SEEDS,
    ),
    mutant(
        "the longest valid prefix of the ranks counts",
        "kvledger/manager/ranks.py",
        "valid = min(answer.valid for answer in answers.values())",
        "valid = max(answer.valid for answer in answers.values())",
        SEEDS,
    ),
    mutant(
        "the best outcome of the ranks counts",
        "kvledger/manager/ranks.py",
        "outcome = max(_OUTCOMES",
        "outcome = min(_OUTCOMES",
        SEEDS,
    ),
    mutant(
        "a quarantine ends at the time-out of the next poll",
        "kvledger/manager/ranks.py",
        "            elif not transfer.quarantined and now > self._orders[id].deadline:\n",
        "            elif transfer.quarantined:\n                self._execute(commands.EndQuarantine(id))\n"
        "                del self._orders[id]\n"
        "            elif not transfer.quarantined and now > self._orders[id].deadline:\n",
        f"{MANAGER}::test_a_hung_worker_times_out_and_its_blocks_stay_quarantined",
    ),
    mutant(
        "a new worker does not end the quarantine of what it will not execute",
        "kvledger/manager/ranks.py",
        "            self._never_again(rank)  # what timed out before it joined is not executed by it\n",
        "",
        f"{MANAGER}::test_what_times_out_while_a_rank_has_no_worker_is_not_quarantined_for_ever",
    ),
    mutant(
        "a new worker does not read what is in flight",
        "kvledger/manager/ranks.py",
        "self.supervisor.start(rank, self._oldest_in_flight())",
        "self.supervisor.start(rank, self._writer.next_sequence)",
        f"{FAILING}::test_killed_at_a_moment_of_its_copy",
        f"{MANAGER}::test_a_killed_worker_is_replaced_and_nothing_is_lost",
    ),
    mutant(
        "a dead worker is started again at once, for ever",
        "kvledger/manager/ranks.py",
        "self._restarts[rank] = time.monotonic() + back_off(failures)",
        "self._restarts[rank] = time.monotonic()",
        "tests/manager/test_ranks.py",
    ),
    mutant(
        "a rank may fail for ever",
        "kvledger/manager/ranks.py",
        "        if self._failures[rank] >= _MOST_FAILURES and",
        "        if False and",
        f"{FAILING}::test_a_rank_that_keeps_failing_costs_the_host_tier",
    ),
    mutant(
        "an adopted worker's acknowledgement of the epoch is not heard",
        "kvledger/manager/ranks.py",
        "                self._heard(answer)\n",
        "                pass\n",
        RECOVERY,
        f"{FAILING}::test_a_quarantine_outlives_its_engine_and_ends",
    ),
    mutant(
        "an adopted worker is not waited for",
        "kvledger/manager/ranks.py",
        "                self._unheard[rank] = time.monotonic() + self._config.ready_timeout_s\n",
        "                self._unheard[rank] = time.monotonic() + self._config.ready_timeout_s\n"
        "                self._never_again(rank)\n",
        f"{FAILING}::test_a_quarantine_outlives_its_engine_and_ends",
    ),
    mutant(
        "an adopted worker that hangs is kept",
        "kvledger/manager/ranks.py",
        '                self.supervisor.kill(rank, "it does not follow the new engine")\n',
        "                pass\n",
        f"{FAILING}::test_an_adopted_worker_that_hangs_is_replaced",
    ),
    mutant(
        "a worker acknowledges an epoch before its copies have ended",
        "workers/transfer.py",
        "                while self.copies.busy():\n",
        "                while False:\n",
        "tests/workers/test_transfer_worker.py",
    ),
    mutant(
        "a worker executes what had ended before it joined",
        "workers/transfer.py",
        "                    self._pending.pop(event.transfer, None)\n",
        "                    pass\n",
        "tests/workers/test_transfer_worker.py",
    ),
    mutant(
        "a worker executes before it has joined",
        "workers/transfer.py",
        "            if self._joined:\n                for transfer",
        "            if True:\n                for transfer",
        "tests/workers/test_transfer_worker.py",
    ),
    mutant(
        "a worker that no engine knows stays",
        "workers/transfer.py",
        "                    self.superseded = True\n                    break\n",
        "                    continue\n",
        "tests/workers/test_transfer_worker.py",
    ),
    mutant(
        "an orphan never leaves",
        "workers/transfer.py",
        "                    if time.monotonic() - orphan_since > orphan_grace_s:\n",
        "                    if False:\n",
        f"{MANAGER}::test_workers_of_a_killed_engine_leave_and_its_name_says_so",
    ),
    mutant(
        "a swap-in copies the layers of the wrong block",
        "workers/pools/numpy.py",
        "host[source : source + size].swapaxes(0, 1)",
        "host[target : target + size].swapaxes(0, 1)",
        f"{MANAGER}::test_bytes_follow_tokens",
    ),
    mutant(
        "a block outside its pool is copied in part",
        "workers/pools/numpy.py",
        "        if ids and not (min(ids) >= 0 and max(ids) < count):",
        "        if False:",
        "tests/workers/test_pools.py::test_a_copy_that_raises_is_an_answer",
    ),
    mutant(
        "a damaged host block is copied with the checksum that it has now",
        "workers/pools/checksums.py",
        "self._digest(block) != int(self._memory.checksums[block]):",
        "False:",
        CHECKSUMS,
    ),
    mutant(
        "a checksum is made before the copy has ended",
        "workers/pools/checksums.py",
        "            self._copies.start(transfer)\n            return\n",
        "            for block in transfer.targets:\n"
        "                self._memory.checksums[block] = self._digest(block)\n"
        "            self._copies.start(transfer)\n            self._out.clear()\n            return\n",
        CHECKSUMS,
    ),
    mutant(
        "a damaged block is answered as a failed copy, and tried again for ever",
        "workers/transfer.py",
        "Status.CORRUPT if corrupt else",
        "",
        CHECKSUMS,
    ),
    mutant(
        "memory that was replaced is taken for the old one",
        "workers/pools/backends.py",
        '                if there == id and (tier == "host"',
        '                if (tier == "host"',
        f"{RECOVERY}::test_a_pool_that_is_not_the_same_is_a_lost_tier",
    ),
    mutant(
        "a swap-in on a GPU does not wait for the copy that empties its target",
        "workers/pools/cuda_copies.py",
        "                    driver.wait_for(stream, self._flying[earlier].event)\n",
        "                    pass\n",
        "tests/workers/test_cuda.py",
    ),
    mutant(
        "events are published before they are applied",
        "kvledger/manager/transactions.py",
        "            if apply_them:\n",
        "            self._writer.publish()\n            if apply_them:\n",
        "tests/manager/test_manager.py::test_an_event_that_cannot_be_applied_is_never_published",
    ),
    mutant(
        "a manager goes on after an event that could not be applied",
        "kvledger/manager/transactions.py",
        "            self.closed = ",
        "            _ = ",
        "tests/manager/test_manager.py::test_an_event_that_cannot_be_applied_is_never_published",
        f"{INTERRUPTED}::test_calls_interrupted_at_any_moment",
    ),
    mutant(
        "what a pause has seen is never reported",
        "kvledger/manager/upkeep.py",
        "            self.fold()\n            return done()\n",
        "            self.poll()\n            return done()\n",
        f"{INTERRUPTED}::test_what_a_pause_has_seen_the_next_poll_reports",
    ),
    mutant(
        "a fork of the engine may write",
        "kvledger/manager/forks.py",
        "            manager.disown()\n",
        "            pass\n",
        f"{INTERRUPTED}::test_a_forked_child_neither_writes_nor_ends_what_is_its_parents",
    ),
    mutant(
        "a fork ends the pushers of its parent",
        "kvledger/manager/execution.py",
        "            handoff.disown()\n",
        "            pass\n",
        f"{INTERRUPTED}::test_a_fork_ends_no_sender_and_no_drop_in",
    ),
    mutant(
        "the exit of a fork closes its parent's drop-in",
        "kvledger/adapters/fastdeploy/pool.py",
        " or os.getpid() != self._pid:",
        ":",
        f"{INTERRUPTED}::test_a_fork_ends_no_sender_and_no_drop_in",
    ),
    mutant(
        "after an interruption the next tokens follow the wrong ones",
        "kvledger/manager/manager.py",
        "        del self._tails[key]  # not known",
        "        # not known",
        f"{INTERRUPTED}::test_what_a_request_was_about_is_not_guessed_after_an_interruption",
    ),
    mutant(
        "a transfer whose order was interrupted has no deadline",
        "kvledger/manager/ranks.py",
        "            self._mend_orders()\n",
        "            pass\n",
        f"{INTERRUPTED}::test_a_transfer_whose_order_was_interrupted_ends_all_the_same",
    ),
    mutant(
        "a signal that comes while a worker is parked is an error",
        "ipc/reader.py",
        "posix_ipc.BusyError, posix_ipc.SignalError",
        "posix_ipc.BusyError",
        f"{FAILING}::test_a_parked_worker_that_is_asked_to_end_just_ends",
    ),
    mutant(
        "a fork keeps the lock of its dead parent",
        "ipc/control.py",
        "        self.close()  # the mapping, too: it has a descriptor of its own\n",
        "        os.close(self._fd)\n",
        f"{INTERRUPTED}::test_a_ledger_can_be_opened_while_a_fork_of_its_dead_engine_lives",
    ),
    mutant(
        "a worker that joined while the log was full is forgotten",
        "kvledger/manager/ranks.py",
        "            self._note(self._changes[0])\n            self._changes.popleft()\n",
        "            self._note(self._changes.popleft())\n",
        f"{INTERRUPTED}::test_a_worker_that_cannot_be_logged_is_logged_later",
    ),
    Mutant(
        "a queued release that finds no room is forgotten",
        (
            Edit(
                "kvledger/manager/execution.py",
                "                command = self._releases[0]\n",
                "                command = self._releases.popleft()\n",
            ),
            Edit(
                "kvledger/manager/execution.py",
                "                self._releases.popleft()\n        finally",
                "        finally",
            ),
        ),
        (f"{INTERRUPTED}::test_releases_from_other_threads_wait_for_room",),
    ),
    mutant(
        "a worker runs what lies in the current directory",
        "workers/processes/programs.py",
        '[sys.executable, "-P", *program]',
        "[sys.executable, *program]",
        "tests/project/test_security.py::test_no_process_runs_what_lies_in_the_current_directory",
    ),
    mutant(
        "any thread may change the cache",
        "kvledger/manager/execution.py",
        "        if get_ident() != self._owner:\n            raise WrongThread(",
        "        if False:\n            raise WrongThread(",
        "tests/manager/test_engine_api.py::test_only_the_owner_changes_anything_but_a_release_comes_from_anywhere",
    ),
    mutant(
        "the watermark is forgotten",
        "statemachine/decide/requests.py",
        "    reserved = command.watermark if state.requests else 0\n",
        "    reserved = 0\n",
        "tests/manager/test_engine_api.py::test_the_watermark_keeps_blocks_for_those_that_run",
    ),
    mutant(
        "blocks of old weights match",
        "kvledger/manager/manager.py",
        "        return versioned(self._weights, namespace) if self._weights else namespace\n",
        "        return namespace\n",
        "tests/manager/test_engine_api.py::test_blocks_of_other_weights_never_match",
    ),
    Mutant(
        "what living workers use is removed",
        (
            Edit(
                "kvledger/doctor/ledgers.py",
                '        if ledger.state == "dead" and ledger.uid',
                "        if ledger.uid",
            ),
            Edit(
                "kvledger/doctor/ledgers.py",
                "        if _workers(ledger.name, control):\n            return False\n",
                "",
            ),
        ),
        ("tests/doctor/test_segments.py::test_from_alive_to_orphaned_to_dead_to_gone",),
    ),
    mutant(
        "a worker that does not read may hold the whole log",
        "kvledger/manager/ranks.py",
        "            if size > most and pid in ranks:\n",
        "            if False:\n",
        f"{MANAGER}::test_a_worker_that_does_not_read_is_replaced_before_the_log_is_full",
    ),
    # followers
    mutant(
        "the auditor does not check the invariants",
        "workers/followers/auditor.py",
        "        broken = check(state)\n        self.checks += 1\n",
        "        broken: list[str] = []\n        self.checks += 1\n",
        "tests/workers/test_auditor.py::test_the_first_event_after_which_an_invariant_fails_is_found",
    ),
    mutant(
        "the auditor names the last event it read",
        "workers/followers/auditor.py",
        "                low, sound = middle + 1, snapshot(state)\n",
        "                low, sound = len(self._since), snapshot(state)\n",
        "tests/workers/test_auditor.py::test_the_first_event_after_which_an_invariant_fails_is_found",
    ),
    mutant(
        "a digest that differs is not noticed",
        "statemachine/records/replay.py",
        "        if take(state) != event.digest:\n",
        "        if False:\n",
        "tests/workers/test_auditor.py::test_another_digest_is_named",
    ),
    mutant(
        "the loss of one tier vouches for the memory of the other",
        "kvledger/manager/ranks.py",
        "ids_after(self._state.pools, pools, tier)",
        "pools",
        "tests/manager/test_recovery.py::test_an_engine_that_dies_between_two_losses_hides_neither",
    ),
    mutant(
        "what a dead engine had begun to create stays in the way",
        "workers/pools/backends.py",
        "            unlink(name)  # it may also be one that a dead engine had only begun to create\n",
        "",
        "tests/manager/test_recovery.py::test_a_pool_that_is_not_the_same_is_a_lost_tier",
    ),
    mutant(
        "a pool that is only begun is taken for one of another layout",
        "workers/pools/memory.py",
        "    if begun:\n",
        "    if False:\n",
        "tests/workers/test_pools.py::test_who_waits_for_the_pools_never_sees_half_of_one",
    ),
    mutant(
        "a pool is announced before its header is visible",
        "workers/pools/memory.py",
        "    _fence()\n    map[: len(MAGIC)] = MAGIC",
        "    map[: len(MAGIC)] = MAGIC",
        WHOLE,
    ),
    mutant(
        "a rank's new tensors are published in the place of those that ended with their process",
        "workers/pools/cuda_pools.py",
        '            raise LedgerNotFound(f"{gone}: open the pools again when the manager has opened the ledger")\n',
        "",
        "tests/workers/test_cuda.py::test_device_tensors_for_an_engine_that_is_gone_are_not_published",
    ),
    mutant(
        "tensors are published in pools that were replaced",
        "workers/pools/cuda_pools.py",
        "        if not self._memory.is_current():\n",
        "        if False:\n",
        "tests/workers/test_cuda.py::test_device_tensors_for_pools_that_were_replaced_are_not_published",
    ),
    mutant(
        "an auditor that died while it made its signals stays in the way",
        "workers/followers/auditor.py",
        "        with contextlib.suppress(LedgerNotFound):\n            return Signals(name)\n",
        "        return Signals(name)\n",
        "tests/workers/test_auditor.py::test_signals_that_were_only_begun_are_in_nobodys_way",
    ),
    mutant(
        "redaction leaves the words",
        "kvledger/recordings/redaction.py",
        "            elif field.meaning == Meaning.CONTENT and value:\n",
        "            elif False:\n",
        "tests/recordings/test_redaction.py::test_structure_stays_and_no_word_does",
    ),
]
