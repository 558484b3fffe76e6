"""Faults in what followers tell others: KV events for routers."""

from __future__ import annotations

from tests.mutants import mutant

EVENTS = "tests/workers/test_kv_events.py"
LIVE = "tests/workers/test_kv_events_live.py"
BELIEVED = f"{EVENTS}::test_a_router_that_believes_them_knows_what_the_ledger_has"
ON_ITS_WAY = f"{EVENTS}::test_what_is_on_its_way_between_tiers_leaves_no_hole"
RESIDENCY = "workers/followers/residency.py"
PUBLISHER = "workers/followers/events.py"

MUTANTS = [
    mutant(
        "a block on its way out of the device is announced nowhere",
        RESIDENCY,
        "    device, host = run.valid() or leaves, run.valid(Tier.HOST)\n",
        "    device, host = run.valid(), run.valid(Tier.HOST)\n",
        ON_ITS_WAY,
    ),
    mutant(
        "what is not computed yet is announced",
        RESIDENCY,
        "        if above.uncomputed:\n            return\n",
        "",
        BELIEVED,
        ON_ITS_WAY,
    ),
    mutant(
        "blocks are announced children first",
        RESIDENCY,
        "    stored = sorted((block.depth, tier, hash)",
        "    stored = sorted((-block.depth, tier, hash)",
        BELIEVED,
    ),
    mutant(
        "what a clearing has retired is announced",
        RESIDENCY,
        "            self._names.clear()  # other trees have names from here on\n",
        "            pass\n",
        BELIEVED,
    ),
    mutant(
        "images are announced as if their words were tokens",
        RESIDENCY,
        "    count = int(items[0]) if len(items) else run.size\n",
        "    count = run.size\n",
        f"{LIVE}::test_what_has_no_name_outside_is_not_announced",
    ),
    mutant(
        "a publisher counts its batches from its own start",
        PUBLISHER,
        "            yield record.sequence - 1, self._payload(changes)\n",
        "            yield self._number(), self._payload(changes)\n\n"
        "    def _number(self) -> int:\n"
        "        self._count = getattr(self, '_count', -1) + 1\n"
        "        return int(self._count)\n",
        f"{LIVE}::test_late_killed_and_restarted",
    ),
]
