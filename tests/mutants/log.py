"""Faults in the log: memory order, commit, retention, recovery, files."""

from __future__ import annotations

from tests.mutants import Edit, Mutant, mutant

WEAK = "tests/campaigns/test_simulation.py::test_the_log_delivers_what_was_written[Order.WEAK]"
BOTH = "tests/campaigns/test_simulation.py::test_the_log_delivers_what_was_written"
SEGMENTS = "tests/campaigns/test_simulation.py::test_the_log_delivers_across_segments[Order.WEAK]"
WRITERS = "tests/campaigns/test_simulation.py::test_the_log_delivers_across_writers[Order.WEAK]"
BEGUN = "tests/campaigns/test_simulation.py::test_a_ledger_that_is_being_created_is_not_there_or_whole"
WAKE = "tests/campaigns/test_simulation.py::test_a_parked_worker_is_never_forgotten"
SEEDS = "tests/campaigns/test_simulation.py::test_engines_workers_and_followers_survive_what_seeds_plan"
LIVENESS = "tests/ipc/test_liveness.py"
LOG = "tests/ipc/test_log.py"
RECOVERY = "tests/ipc/test_log_recovery.py"
SECURITY = "tests/project/test_security.py"
_FENCE = "        self._release()\n        self._acquire()\n"

MUTANTS = [
    # memory order
    mutant(
        "the writer does not fence before the hint",
        "ipc/writer.py",
        "        self._release()  # who sees the hint sees all that it covers, commit words included\n"
        "        self._acquire()\n",
        "",
        WEAK,
    ),
    mutant(
        "the reader does not fence after the hint",
        "ipc/reader.py",
        _FENCE + "        return self._read(segment, tail, limit)",
        "        return self._read(segment, tail, limit)",
        WEAK,
    ),
    mutant(
        "the reader does not fence after it saw that the writer is dead",
        "ipc/reader.py",
        "        self._release()  # that it is dead, or succeeded, was read before what it wrote\n"
        "        self._acquire()\n",
        "",
        WRITERS,
    ),
    mutant(
        "the tail hint before the commit words",
        "ipc/writer.py",
        "        words32 = self._words32\n        for word, value in commits:\n",
        "        words32 = self._words32\n        self._words[TAIL] = offset\n        for word, value in commits:\n",
        BOTH,
    ),
    mutant(
        "the commit word with the body",
        "ipc/writer.py",
        "            commits.append((word, crc))\n",
        "            commits.append((word, crc))\n            self._words32[word] = crc\n",
        f"{LOG}::test_what_is_staged_is_not_seen_and_is_overwritten",
        f"{RECOVERY}::test_what_was_staged_and_not_published_does_not_count",
    ),
    mutant(
        "a sequence number is proof enough",
        "ipc/record.py",
        "            if crc != committed:\n                break\n",
        "",
        f"{LOG}::test_a_flipped_bit_is_found",
    ),
    mutant(
        "the doorbell is looked at before the hint is visible",
        "ipc/writer.py",
        _FENCE + "        words = self._control.words\n        for line, parked",
        "        words = self._control.words\n        for line, parked",
        WAKE,
    ),
    mutant(
        "a worker parks without a fence",
        "ipc/reader.py",
        "            self._control.words[parked] = 1\n            self._release()\n            self._acquire()\n",
        "            self._control.words[parked] = 1\n",
        WAKE,
    ),
    mutant(
        "a worker parks without looking again",
        "ipc/reader.py",
        "            records = self.poll()\n            if not records:\n",
        "            records: list[Record] = []\n            if not records:\n",
        WAKE,
    ),
    Mutant(
        "the next segment is announced before its header is visible",
        (
            Edit(
                "ipc/writer.py",
                _FENCE + "        old[2][NEXT]",
                "        old[2][NEXT]",
            ),
            Edit("ipc/writer.py", _FENCE + "        self._control.current =", "        self._control.current ="),
        ),
        (SEGMENTS,),
    ),
    mutant(
        "the reader goes on to the next segment without reading the last one to its end",
        "ipc/reader.py",
        "            tail = segment.words[TAIL]\n            if tail == self._at.offset:\n",
        "            if tail == self._at.offset:\n",
        SEGMENTS,
    ),
    # what counts
    mutant(
        "a new ledger is announced before it is described",
        "ipc/control.py",
        "                control.words[0], control.words[1], control.words[_SCHEMA] = MAGIC, VERSION, schema_hash\n"
        "                control.lock()\n                control.begin_writing()\n                begun.publish()\n",
        "                begun.publish()\n"
        "                control.words[0], control.words[1], control.words[_SCHEMA] = MAGIC, VERSION, schema_hash\n"
        "                control.lock()\n                control.begin_writing()\n",
        BEGUN,
        f"{SECURITY}::test_an_object_has_its_name_when_it_is_complete",
    ),
    # what is a ledger's own
    mutant(
        "an object has its name before it is filled",
        "ipc/memory.py",
        "        map[: len(content)] = content\n        begun.publish()\n",
        "        begun.publish()\n        map[: len(content)] = content\n",
        f"{SECURITY}::test_an_object_has_its_name_when_it_is_complete",
    ),
    mutant(
        "a taken name stops the writer",
        "ipc/memory.py",
        "                if taken or identity is None or name == control_name(ledger_of(name)):\n",
        "                if True:\n",
        f"{SECURITY}::test_a_name_that_somebody_took_before",
    ),
    mutant(
        "what stands beside a name is not looked for",
        "ipc/ownership.py",
        "    yield from sorted(file for file in listing()",
        "    yield from sorted(file for file in ()",
        f"{SECURITY}::test_a_name_that_somebody_took_before",
    ),
    mutant(
        "whatever carries a stamp is attached",
        "ipc/memory.py",
        "        if ownership.read_stamp(memory.fd, size, name) == wanted:\n",
        "        if ownership.read_stamp(memory.fd, size, name) is not None:\n",
        f"{SECURITY}::test_closing_a_ledger_removes_nothing_of_another",
    ),
    mutant(
        "whatever has a ledger's name is removed with it",
        "ipc/ownership.py",
        "own.identity == wanted or not wanted]",
        "own.identity or not wanted]",
        f"{SECURITY}::test_closing_a_ledger_removes_nothing_of_another",
    ),
    mutant(
        "half a transaction is delivered",
        "ipc/record.py",
        "            if flags & TXN_END:\n                complete",
        "            if True:\n                complete",
        f"{LOG}::test_half_a_transaction_is_never_delivered",
    ),
    Mutant(
        "the checksum leaves out the payload",
        (
            Edit("ipc/writer.py", "crc = crc32c(line + head, crc)", "crc = crc32c(line, crc)"),
            Edit("ipc/writer.py", "                crc = crc32c(tail, crc)\n", ""),
            Edit("ipc/record.py", "                crc = crc32c(payload, crc)\n", ""),
        ),
        (f"{LOG}::test_a_flipped_bit_is_found",),
    ),
    mutant(
        "a sealed segment does not name its successor",
        "ipc/writer.py",
        "        old[2][NEXT] = self._index  # seals it; readers go on to the next one\n",
        "",
        f"{LOG}::test_a_sealed_segment_says_which_one_follows",
    ),
    mutant(
        "what is staged moves the writer on",
        "ipc/writer.py",
        "        self._staged = commits, offset, crc, sequence, mask\n",
        "        self._staged = commits, offset, crc, sequence, mask\n        self._offset = offset\n",
        f"{LOG}::test_what_is_staged_is_not_seen_and_is_overwritten",
    ),
    mutant(
        "woken for every kind",
        "ipc/writer.py",
        "words[parked] and words[wanted] & mask",
        "words[parked]",
        f"{LOG}::test_a_parked_worker_is_woken_for_its_kinds_only",
    ),
    mutant(
        "the doorbell of a dead worker is kept",
        "ipc/writer.py",
        "        self._bells.clear()\n        self._listeners",
        "        self._listeners",
        f"{LOG}::test_the_next_worker_on_a_line_is_woken_too",
    ),
    mutant(
        "lines of dead readers are never used again",
        "ipc/control.py",
        "            if line not in self._own_lines and self._lock.take(_LINES + line * _LINE_BYTES, _LINE_BYTES):\n",
        "            if not self.words[self.line(line) + PID] and self._lock.take(_LINES + line * 64, 64):\n",
        f"{LOG}::test_too_many_readers_and_dead_lines_are_reused",
    ),
    mutant(
        "a reused process id is taken for the process",
        "ipc/processes.py",
        "    if found == process.started:\n",
        "    if found:\n",
        f"{LIVENESS}::test_numbers_prove_a_death_or_say_nothing",
    ),
    mutant(
        "any error counts as proof of death",
        "ipc/processes.py",
        "        if error.errno == errno.ESRCH:\n            return Life.DEAD\n",
        "        return Life.DEAD\n",
        f"{LIVENESS}::test_numbers_prove_a_death_or_say_nothing",
    ),
    mutant(
        "numbers of another namespace are believed",
        "ipc/processes.py",
        "process.namespace == UNKNOWN_NAMESPACE or process.namespace != own_namespace()",
        "process.namespace == UNKNOWN_NAMESPACE",
        f"{LIVENESS}::test_numbers_prove_a_death_or_say_nothing",
    ),
    mutant(
        "a fork keeps its parent's locks",
        "ipc/liveness.py",
        "        lock.disown()\n",
        "        pass\n",
        f"{LIVENESS}::test_a_fork_keeps_no_lock_of_its_parent",
    ),
    mutant(
        "two writers",
        "ipc/control.py",
        "        while not self._lock.take(0, _LINES):\n",
        "        while False:\n",
        "tests/manager/test_recovery.py::test_a_killed_engine_is_succeeded_with_a_warm_cache",
    ),
    mutant(
        "others may read",
        "ipc/memory.py",
        "os.fchmod(self.fd, 0o600)",
        "os.fchmod(self.fd, 0o644)",
        f"{LOG}::test_objects_are_private_and_gone_after_a_clean_stop",
    ),
    # retention
    mutant(
        "the cursor of a worker runs ahead of what it was given",
        "ipc/reader.py",
        "+ CURSOR] = self.cursor",
        "+ CURSOR] = 1 << 62",
        f"{LOG}::test_a_worker_holds_the_log_back",
    ),
    mutant(
        "retention does not ask the workers",
        "ipc/writer.py",
        "                passed = min(passed, reader.cursor)",
        "                pass",
        f"{LOG}::test_a_worker_holds_the_log_back",
    ),
    mutant(
        "retention forgets workers that are yet to come",
        "ipc/writer.py",
        "        self._needed_from = self.next_sequence if self._hold is None else self._hold()",
        "        self._needed_from = self.next_sequence",
        f"{LOG}::test_the_log_is_held_for_a_worker_that_is_yet_to_come",
    ),
    mutant(
        "a segment goes when its first record was read",
        "ipc/writer.py",
        "and self._kept[1][2] <= passed:",
        "and self._kept[0][2] <= passed:",
        f"{LOG}::test_a_worker_holds_the_log_back",
        f"{LOG}::test_the_log_is_held_for_a_worker_that_is_yet_to_come",
    ),
    mutant(
        "retention does not ask for a snapshot",
        "ipc/writer.py",
        "            passed = min(passed, snapshots.newest_sequence(self.ledger) + 1)\n",
        "            pass\n",
        "tests/workers/test_auditor.py::test_nothing_goes_that_no_snapshot_covers",
    ),
    mutant(
        "the log keeps what is too old",
        "ipc/writer.py",
        "0 < self._retain_ns < 2 * (time.time_ns() - self._kept[0][3])",
        "False",
        "tests/manager/test_retain_seconds.py::test_a_prompt_that_is_not_cached_any_more_is_gone_in_time",
    ),
    mutant(
        "a snapshot of before is kept although its time is over",
        "workers/followers/auditor.py",
        "_SNAPSHOTS_KEPT if snapshot_s is None else 1",
        "_SNAPSHOTS_KEPT",
        "tests/manager/test_retain_seconds.py::test_a_prompt_that_is_not_cached_any_more_is_gone_in_time",
    ),
    mutant(
        "a full shared memory stops those that give something back",
        "ipc/writer.py",
        "        if fits and giving_back:\n            return\n",
        "",
        "tests/ipc/test_limits.py",
    ),
    mutant(
        "a writer that takes over drops what it does not know to be needed",
        "ipc/writer.py",
        "        self._needed_from = self._kept[0][2] if self._kept else base_sequence\n",
        "        self._needed_from = base_sequence\n",
        f"{RECOVERY}::test_a_writer_that_takes_over_without_room_drops_nothing",
    ),
    # recovery
    mutant(
        "a dead writer's log ends at its hint",
        "ipc/reader.py",
        "        records, _ = self._at.read(segment.buffer, len(segment.buffer), self.cursor, limit)",
        "        records, _ = self._at.read(segment.buffer, segment.words[TAIL], self.cursor, limit)",
        f"{RECOVERY}::test_a_reader_of_a_dead_ledger_sees_what_the_hint_does_not_say",
    ),
    mutant(
        "published records that are damaged are cut off",
        "ipc/recovery.py",
        "    elif end.offset < published:\n        decision, again = Decision.CORRUPT, published\n",
        "",
        f"{RECOVERY}::test_decision_table",
    ),
    mutant(
        "intact records after a damaged one are cut off",
        "ipc/recovery.py",
        "    if found := _intact_again(data, bad, sequence, crc, published):",
        "    if found := 0:",
        f"{RECOVERY}::test_decision_table",
    ),
    mutant(
        "a prompt is searched for records",
        "ipc/recovery.py",
        "                if offset >= published:\n                    step = after - offset\n",
        "",
        f"{RECOVERY}::test_a_prompt_that_looks_like_records_is_not_taken_for_corruption",
    ),
    mutant(
        "a header that was never finished is damage",
        "ipc/segment.py",
        "        return crc32c(data) != crc and not any(map[HEADER_BYTES:])\n",
        "        return not any(data) and not crc\n",
        f"{RECOVERY}::test_a_header_that_was_never_finished_is_no_damage",
    ),
    mutant(
        "a used segment with a damaged header is taken for an empty one",
        "ipc/segment.py",
        " and not any(map[HEADER_BYTES:])\n",
        "\n",
        f"{RECOVERY}::test_a_header_that_was_never_finished_is_no_damage",
    ),
    mutant(
        "an epoch is used twice",
        "ipc/writer.py",
        "    return max([control.current[0], *(epoch for epoch, _ in segments_of(control.ledger))]) + 1",
        "    return control.current[0] + 1",
        f"{RECOVERY}::test_the_epoch_of_a_writer_that_died_while_it_began_is_not_used_again",
    ),
    mutant(
        "a damaged snapshot is believed",
        "ipc/snapshots.py",
        " or len(body) != size or crc32c(body) != crc:",
        " or len(body) != size:",
        "tests/ipc/test_snapshots.py::test_a_damaged_snapshot_is_passed_over",
    ),
    mutant(
        "a recording that could not be written is said to be ended",
        "ipc/kvlog.py",
        "        ended, self.ended = self.ended, False\n",
        "        ended = self.ended\n",
        "tests/recordings/test_damaged_recordings.py::test_what_could_not_be_written_is_not_said_to_be_ended",
    ),
    mutant(
        "a redacted recording is whole although its source is not",
        "kvledger/recordings/redaction.py",
        "                writer.ended = reader.ended and reader.damage is None\n",
        "",
        "tests/recordings/test_damaged_recordings.py::test_a_recording_without_an_end_mark_is_used_and_said_to_be_unfinished",
    ),
    mutant(
        "a ledger that is given up twice closes a file of somebody else",
        "ipc/liveness.py",
        "        fd, self.fd = self.fd, -1\n",
        "        fd = self.fd\n",
        "tests/manager/test_interrupted.py::test_a_fork_closes_no_file_of_somebody_else",
    ),
    mutant(
        "a damaged file ends as if that were its end",
        "ipc/kvlog.py",
        "            if chunk is None or chunk[0] != _RECORDS:\n                self._end_here(at.offset)\n",
        "            if chunk is None or chunk[0] != _RECORDS:\n",
        f"{LOG}::test_a_kvlog_file_with_a_chunk_cut_out_ends_there",
    ),
    mutant(
        "a flipped byte costs the rest of the file",
        "ipc/kvlog.py",
        "        if self.damage is None or self._goes_on is None:\n",
        "        if True:\n",
        "tests/recordings/test_worst_moments.py::test_a_flipped_byte_costs_one_chunk",
    ),
    mutant(
        "what is behind missing events is not shown",
        "kvledger/debugger/source/filters.py",
        "        return _both(found, source.intact())\n",
        "        return found\n",
        "tests/recordings/test_worst_moments.py::test_what_commands_say_behind_damage",
    ),
    mutant(
        "a damaged header is taken for events that are gone",
        "ipc/reader.py",
        "            if (damage := damaged_beginning(self.ledger, current)) is not None:\n",
        "            if (damage := None) is not None:\n",
        f"{RECOVERY}::test_readers_call_a_damaged_header_damage",
    ),
]
