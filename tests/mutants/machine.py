"""Faults in the state machine."""

from __future__ import annotations

from tests.mutants import Edit, Mutant, mutant

ANY = "tests/statemachine/test_machine.py::test_machine"
ONE_TIER = f"{ANY}[OneTierMachine]"
EXCLUSIVE = f"{ANY}[ExclusiveMachine]"
THROUGH = f"{ANY}[WriteThroughMachine]"

MUTANTS = [
    # pins and orders
    mutant(
        "a match does not pin its runs",
        "statemachine/apply/tree.py",
        "        node.pins += 1\n        node = node.parent\n    node.pins += 1",
        "        node = node.parent\n    node.pins += 1",
        ONE_TIER,
    ),
    mutant(
        "a match does not pin its root",
        "statemachine/apply/tree.py",
        "        node.pins += 1\n        node = node.parent\n    node.pins += 1\n",
        "        node.pins += 1\n        node = node.parent\n",
        ONE_TIER,
    ),
    mutant(
        "a release does not unpin the root",
        "statemachine/apply/tree.py",
        "    if node is not above:\n        node.pins -= 1\n",
        "    if node is not above:\n",
        ONE_TIER,
    ),
    mutant(
        "caching does not pin what others had cached",
        "statemachine/apply/cache.py",
        "    pin_below(state, chain)\n    position = 0\n",
        "    position = 0\n",
        "tests/statemachine/test_golden.py::test_story[duplicate]",
        ONE_TIER,
    ),
    mutant(
        "extending a path does not pin it",
        "statemachine/apply/requests.py",
        "    pin_below(state, chain)\n",
        "",
        ONE_TIER,
    ),
    mutant(
        "a swap-in does not pin its path",
        "statemachine/apply/transfers.py",
        "    pin(state, nodes[-1])\n",
        "",
        EXCLUSIVE,
    ),
    mutant(
        "the evictable blocks are counted one off",
        "statemachine/apply/tree.py",
        "            place.evictable -= node.size\n",
        "            place.evictable -= node.size - 1\n",
        ONE_TIER,
    ),
    mutant(
        "ancestors are evicted before their descendants",
        "statemachine/apply/tree.py",
        "                    place.orders[0 if final > 0 else -1].append(node)\n",
        "                    place.orders[0 if final > 0 else -1].insert_after(None, node)\n",
        ONE_TIER,
    ),
    mutant(
        "clearing a namespace reaches into another",
        "statemachine/decide/eviction.py",
        "            if root is not None and root_of(node) is not root:\n",
        "            if False:\n",
        ONE_TIER,
    ),
    mutant(
        "a batch is told that would fit what a copy is in the way of",
        "statemachine/decide/requests.py",
        "        if can_allocate(state, sums[middle]):\n",
        "        if True:\n",
        "tests/manager/test_engine_api.py::test_a_batch_is_not_told_that_would_fit_what_a_copy_is_in_the_way_of",
    ),
    mutant(
        "the most recently released is evicted first",
        "statemachine/decide/eviction.py",
        "        for node in order:\n            have = node.size\n",
        "        for node in [run for run in [*order][::-1] if not run.children]:\n            have = node.size\n",
        ONE_TIER,
    ),
    mutant(
        "the final hint is ignored",
        "statemachine/decide/requests.py",
        "    if command.final:\n",
        "    if False:\n",
        ONE_TIER,
    ),
    Mutant(
        "the final hint reaches runs that others continue",
        (
            Edit(
                "statemachine/decide/requests.py",
                "            if len(run.children) > (1 if index else 0):\n                break\n",
                "",
            ),
            Edit(
                "statemachine/apply/requests.py",
                " or any(len(run.children) > (1 if i else 0) for i, run in enumerate(loose[:final]))",
                "",
            ),
        ),
        (ONE_TIER,),
    ),
    # blocks
    mutant(
        "what a transfer held is freed twice",
        "statemachine/apply/transfers.py",
        "held_sources)\n    state.places[transfer.target].pool.free.extend(transfer.held_targets)\n",
        "held_sources)\n    state.places[transfer.target].pool.free.extend(transfer.held_targets * 2)\n",
        "tests/statemachine/test_golden.py::test_story[timed-out swap-in]",
        EXCLUSIVE,
    ),
    mutant(
        "duplicates are not the request's own",
        "statemachine/state/nodes.py",
        "        for start, stop in reversed(self.duplicates):\n            own = table[start:stop] + own\n",
        "",
        "tests/statemachine/test_golden.py::test_story[duplicate]",
        ONE_TIER,
    ),
    mutant(
        "a block is free while a copy reads it",
        "statemachine/apply/blocks.py",
        "        if transfer.direction != SWAP_IN:\n",
        "        if False:\n",
        "tests/statemachine/test_golden.py::test_story[released while its blocks are copied out]",
        EXCLUSIVE,
    ),
    mutant(
        "an evicted block is free while its back-up reads it",
        "statemachine/apply/cache.py",
        "    (place.pool.free if node.transfer is None else node.transfer.held_sources).extend(blocks)\n",
        "    place.pool.free.extend(blocks)\n",
        THROUGH,
    ),
    Mutant(
        "a release frees its blocks in the wrong order",
        (
            Edit(
                "statemachine/decide/requests.py",
                "    blocks = request.private()[::-1]\n",
                "    blocks = request.private()\n",
            ),
            Edit(
                "statemachine/apply/requests.py",
                "    own = request.private()[::-1]\n",
                "    own = request.private()\n",
            ),
        ),
        (ONE_TIER,),
    ),
    mutant(
        "a trimmed request still waits for what it gave back",
        "statemachine/apply/blocks.py",
        "        del request.waits[id]\n        del state.transfers[id].waiters[request.id]\n",
        "        pass\n",
        "tests/statemachine/test_golden.py::test_story[trimmed while its blocks are copied out]",
        EXCLUSIVE,
    ),
    mutant(
        "the pool shrinks below blocks in use",
        "statemachine/decide/pools.py",
        "    for block in sorted(blocks - cached):\n        raise Busy",
        "    for block in ():\n        raise Busy",
        EXCLUSIVE,
    ),
    # runs
    mutant(
        "a split gives the lower part the new id",
        "statemachine/apply/tree.py",
        "    state.nodes[upper_id] = upper\n    state.next_node = upper_id + 1\n",
        "    upper.id, node.id = node.id, upper_id\n    state.nodes[upper.id] = upper\n"
        "    state.nodes[node.id] = node\n    state.next_node = upper_id + 1\n",
        ONE_TIER,
        "tests/statemachine/test_golden.py",
    ),
    mutant(
        "the upper part of a split is not pinned",
        "statemachine/apply/tree.py",
        "    upper.pins, upper.hits, upper.ahead = node.pins, node.hits, node.ahead\n",
        "    upper.hits, upper.ahead = node.hits, node.ahead\n",
        ONE_TIER,
    ),
    mutant(
        "runs with different copies merge",
        "statemachine/state/nodes.py",
        "            if (mine is None) != (its is None):\n                return False\n",
        "            pass\n",
        "tests/statemachine/test_golden.py::test_story[no merge across copies]",
        THROUGH,
    ),
    mutant(
        "runs merge while one is in flight",
        "statemachine/state/nodes.py",
        "            or parent.transfer is not None\n",
        "",
        "tests/statemachine/test_golden.py::test_story[no merge with what is in flight]",
        THROUGH,
    ),
    mutant(
        "what is deleted below a run is freed in the order in which it got there",
        "statemachine/apply/tree.py",
        "        subtree.extend(sorted(node.children.values(), key=lambda child: child.id))\n",
        "        subtree.extend(node.children.values())\n",
        "tests/statemachine/test_machine.py::test_a_restored_state_deletes_like_the_original",
    ),
    mutant(
        "every turn of a long conversation copies all that was said",
        "statemachine/decide/requests.py",
        "_LONG_BYTES: Final = 1 << 16\n",
        "_LONG_BYTES: Final = 1 << 40\n",
        "tests/manager/test_manager.py::test_a_turn_of_a_long_conversation_is_not_paid_with_a_copy_of_all_that_was_said",
    ),
    mutant(
        "content is compared by its first block",
        "statemachine/state/tree.py",
        "        if run.startswith(words[offset + start : offset + stop], start):\n",
        "        if step:\n",
        ONE_TIER,
    ),
    Mutant(
        "a match looks into another namespace",
        (
            Edit(
                "statemachine/decide/hits.py",
                "state.roots.get(command.namespace), command.words",
                'state.roots.get(b""), command.words',
            ),
            Edit(
                "statemachine/apply/requests.py",
                "        if node is not namespace_root:\n",
                "        if False:\n",
            ),
        ),
        (ONE_TIER, "tests/manager/test_engine_api.py::test_blocks_of_other_weights_never_match"),
    ),
    mutant(
        "what was cleared still matches",
        "statemachine/apply/cache.py",
        "    state.roots = {}\n",
        "",
        ONE_TIER,
    ),
    # tiers and transfers
    Mutant(
        "the host tier takes more than it may hold",
        (
            Edit(
                "statemachine/decide/eviction.py",
                "    room = min(host.limit - host.resident + leaving, len(host.pool.free))\n",
                "    room = len(host.pool.free)\n",
            ),
        ),
        (EXCLUSIVE,),
    ),
    mutant(
        "host copies in flight are evicted",
        "statemachine/decide/eviction.py",
        "        if node.transfer is not None:\n            continue\n",
        "",
        EXCLUSIVE,
    ),
    mutant(
        "a match goes through a block that is still arriving on the host",
        "statemachine/state/nodes.py",
        "        return self.transfer is None and any(copy is not None and copy.ready for copy in self.copies)\n",
        "        return True\n",
        EXCLUSIVE,
    ),
    mutant(
        "who joins a swap-in does not wait for it",
        "statemachine/apply/requests.py",
        "            request.waits.setdefault(node.transfer.id, node.start)\n"
        "            node.transfer.waiters[request.id] = None\n",
        "            pass\n",
        EXCLUSIVE,
    ),
    mutant(
        "a grant does not say for which copies to wait",
        "statemachine/apply/blocks.py",
        "        if stop > plain:\n",
        "        if False:\n",
        "tests/statemachine/test_golden.py::test_story[swap out and in]",
        EXCLUSIVE,
    ),
    mutant(
        "a timed-out copy is not quarantined",
        "statemachine/apply/transfers.py",
        "    if outcome == Outcome.TIMED_OUT:\n",
        "    if False:\n",
        "tests/statemachine/test_golden.py::test_story[timed out]",
        EXCLUSIVE,
    ),
    mutant(
        "a quarantine frees what a late copy may still write",
        "statemachine/apply/transfers.py",
        '        transfer.held_sources = array("i")\n        transfer.parts = []\n',
        "        state.places[transfer.target].pool.free.extend(transfer.held_targets)\n"
        '        transfer.held_sources = transfer.held_targets = array("i")\n        transfer.parts = []\n',
        "tests/statemachine/test_machine.py::test_what_a_late_copy_may_still_write_stays_quarantined",
        EXCLUSIVE,
    ),
    mutant(
        "the invalid end of a swap-in counts",
        "statemachine/apply/transfers.py",
        "        good = position + part.size <= valid\n        position += part.size\n        node = part.node\n"
        "        if part.discard",
        "        good = position <= valid\n        position += part.size\n        node = part.node\n"
        "        if part.discard",
        EXCLUSIVE,
        "tests/statemachine/test_golden.py",
    ),
    mutant(
        "a failed swap-out leaves what was below it",
        "statemachine/apply/tree.py",
        "        subtree.extend(sorted(node.children.values(), key=lambda child: child.id))\n",
        "        break\n",
        EXCLUSIVE,
    ),
    mutant(
        "a corrupt host copy is kept",
        "statemachine/apply/transfers.py",
        "    if undone and outcome == Outcome.CORRUPT:\n",
        "    if False:\n",
        "tests/statemachine/test_golden.py::test_story[corrupt swap-in]",
    ),
    Mutant(
        "what is not computed yet is copied out",
        (
            Edit("statemachine/decide/transfers.py", "if not run.valid() or run.ahead or", "if not run.valid() or"),
            Edit(
                "statemachine/apply/transfers.py",
                " or node.transfer is not None or node.ahead:",
                " or node.transfer is not None:",
            ),
        ),
        (
            THROUGH,
            "tests/manager/test_engine_api.py::test_what_is_cached_ahead_matches_but_is_not_copied_out_before_it_is_computed",
        ),
    ),
    mutant(
        "a run of which a part is computed counts as computed",
        "statemachine/apply/requests.py",
        "        if node.end <= event.blocks:\n",
        "        if node.start < event.blocks:\n",
        "tests/statemachine/test_machine.py::test_a_run_that_is_computed_in_part_is_not_computed",
        ONE_TIER,
    ),
    # epochs
    mutant(
        "untrusted blocks are kept",
        "statemachine/decide/ledger.py",
        "    doomed = _doomed(trial, suspects)\n",
        "    doomed: set[Node] = set()\n",
        ONE_TIER,
    ),
    mutant(
        "copies of untrusted blocks go on",
        "statemachine/decide/ledger.py",
        "    for id in sorted({node.transfer.id for node in suspects if node.transfer is not None}):\n",
        "    for id in ():\n",
        "tests/statemachine/test_machine.py::test_a_new_epoch_gives_up_copies_of_untrusted_blocks",
        THROUGH,
    ),
    mutant(
        "what a request joined counts as cached by it",
        "statemachine/decide/ledger.py",
        "request.duplicates + request.joined):",
        "request.duplicates):",
        "tests/manager/test_engine_api.py::test_a_successor_keeps_what_others_vouch_for",
        ONE_TIER,
    ),
    # purity
    mutant(
        "a refusal changes the state",
        "statemachine/decide/requests.py",
        "    if supply is None:\n        leaf = path.leaf.id",
        "    if supply is None:\n        state.counters.queried_blocks += wanted\n        leaf = path.leaf.id",
        ONE_TIER,
    ),
    mutant(
        "decide changes the state",
        "statemachine/decide/requests.py",
        "    blocks = request.table[command.blocks :][::-1]\n    return",
        "    blocks = request.table[command.blocks :][::-1]\n    request.words = request.words[:4]\n    return",
        ONE_TIER,
    ),
    mutant(
        "an event is half applied before it is refused",
        "statemachine/apply/blocks.py",
        "    requests = [live[id] if id in live else request_of(state, event, id) for id in ids]\n"
        "    if held or after:\n",
        "    state.counters.allocated_blocks += total\n"
        "    requests = [live[id] if id in live else request_of(state, event, id) for id in ids]\n"
        "    state.counters.allocated_blocks -= total\n    if held or after:\n",
        "tests/statemachine/test_invariants.py::test_an_impossible_event_is_named_and_changes_nothing",
    ),
    # bytes
    mutant(
        "the digest leaves out the eviction order",
        "statemachine/records/snapshot.py",
        'blob(array("Q", [node.id for node in order]).tobytes())',
        'blob(array("Q", sorted(node.id for node in order)).tobytes())',
        ANY,
    ),
    mutant(
        "the digest leaves out the order of the free list",
        "statemachine/records/snapshot.py",
        "            blob(place.pool.free.tobytes())\n",
        '            blob(array("i", sorted(place.pool.free)).tobytes())\n',
        ANY,
    ),
    mutant(
        "the digest leaves out who waits",
        "statemachine/records/snapshot.py",
        '            blob(array("Q", transfer.waiters).tobytes())\n',
        '            blob(b"")\n',
        EXCLUSIVE,
    ),
    mutant(
        "a snapshot forgets how often a run was used",
        "statemachine/records/snapshot.py",
        "            node.pins, node.hits = pins, hits\n",
        "            node.pins = pins\n",
        THROUGH,
    ),
    mutant(
        "a snapshot forgets what is computed",
        "statemachine/records/snapshot.py",
        "            request.computed = computed\n",
        "",
        ANY,
    ),
    mutant(
        "two fields of an event change places",
        "statemachine/records/codec.py",
        '    parts = ["head[24:]"] * bool(spill) + [name for name, _ in variable]\n',
        '    parts = ["head[24:]"] * bool(spill) + [name for name, _ in variable[:-2] + variable[-2:][::-1]]\n',
        "tests/statemachine/test_codec.py::test_round_trip",
    ),
    mutant(
        "an event of the wrong length is decoded",
        "statemachine/records/codec.py",
        "    yield f\"    if len(payload) {'<' if variable else '!='} {start}:\"\n",
        '    yield "    if False:"\n',
        "tests/statemachine/test_codec.py::test_truncated_and_flipped_payloads_are_refused_or_another_event",
    ),
    # content
    mutant(
        "a list is not looked at for tokens beyond int32",
        "statemachine/content.py",
        "    return words if _is_plain(words) else None\n",
        "    return words\n",
        "tests/statemachine/test_content.py::test_what_is_no_token_is_rejected",
    ),
    mutant(
        "only the first bytes of an item's hash count",
        "statemachine/items.py",
        "hashlib.sha256(item.hash).digest()",
        "hashlib.sha256(item.hash[:16]).digest()",
        "tests/manager/test_content_in_full.py::test_another_image_matches_up_to_where_it_begins",
    ),
    mutant(
        "items inside a run are told apart by their words alone",
        "statemachine/state/tree.py",
        "            common = agreement(child.items, items, node.start, node.start + common) - node.start\n",
        "            pass\n",
        "tests/manager/test_content_in_full.py::test_another_image_matches_up_to_where_it_begins",
        "tests/statemachine/test_machine.py::test_machine[OneTierMachine]",
    ),
    mutant(
        "between two chunks a path goes on into an item that must not be cut",
        "statemachine/decide/requests.py",
        "    if request.items and not state.opened.chunked_multimodal:\n",
        "    if request.id < 0:\n",
        "tests/manager/test_content_in_full.py::"
        "test_what_goes_on_between_chunks_ends_before_an_image_that_must_not_be_cut",
        "tests/statemachine/test_machine.py::test_machine[OneTierMachine]",
    ),
    mutant(
        "the weights in force are forgotten",
        "statemachine/apply/ledger.py",
        "    state.weights = event.weights\n",
        "    pass\n",
        "tests/manager/test_content_in_full.py::test_the_weights_in_force_outlive_their_engine",
    ),
    mutant(
        "a namespace passes for one of other weights",
        "statemachine/content.py",
        "    if not weights and not namespace.startswith(_VERSIONED):\n",
        "    if not weights:\n",
        "tests/manager/test_content_in_full.py::test_no_namespace_passes_for_other_weights",
    ),
    mutant(
        "an item can equal tokens",
        "statemachine/content.py",
        '[:_PATTERN_BYTES], "<u4") | _SIGN',
        '[:_PATTERN_BYTES], "<u4") & ~_SIGN',
        "tests/statemachine/test_content.py::test_images_never_equal_tokens_and_tell_content_and_position",
    ),
    mutant(
        "tokens beyond int32 wrap around",
        "statemachine/content.py",
        '    if int(unsigned.max()) >= 1 << min(8 * array.dtype.itemsize - (array.dtype.kind == "i"), 31):\n',
        "    if False:\n",
        "tests/statemachine/test_content.py::test_what_is_no_token_is_rejected",
    ),
    mutant(
        "negative tokens pass",
        "statemachine/content.py",
        "        and (not len(tokens) or bool(np.minimum.reduce(tokens) >= 0))\n",
        "",
        "tests/statemachine/test_content.py::test_what_is_no_token_is_rejected",
    ),
    mutant(
        "many block ids are granted in the order in which they lie on the free list",
        "statemachine/state/nodes.py",
        "np.frombuffer(ids, np.int32)[: -count - 1 : -1].tobytes()",
        "np.frombuffer(ids, np.int32)[len(ids) - count :].tobytes()",
        "tests/statemachine/test_machine.py::test_many_ids_are_turned_round_as_few_are",
    ),
    mutant(
        "two namespaces have one key",
        "statemachine/content.py",
        '    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)\n',
        '    return b"".join(parts)\n',
        "tests/statemachine/test_content.py::test_namespaces_differ",
    ),
]
