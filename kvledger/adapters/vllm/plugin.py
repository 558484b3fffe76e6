"""The general plugin: every vLLM engine of this environment gets a ledger, without any flag.

vLLM loads plugins of the group ``vllm.general_plugins`` in each of its processes before it makes a scheduler;
``VLLM_PLUGINS`` restricts which. Installing kvledger alone changes nothing: ``KVLEDGER_VLLM=1`` switches this one on.
"""

from __future__ import annotations

import functools
import os
from typing import Any


def register() -> None:
    """Let schedulers take a ledger as they are made, if ``KVLEDGER_VLLM`` says so."""
    if os.environ.get("KVLEDGER_VLLM") != "1":
        return
    from vllm.v1.core.sched.scheduler import Scheduler

    from kvledger.adapters.vllm.manager import LedgerKVCacheManager
    from kvledger.adapters.vllm.scheduler import take_over

    own = Scheduler.__init__
    if getattr(own, "with_ledger", False):
        return

    @functools.wraps(own)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        if not isinstance(self.kv_cache_manager, LedgerKVCacheManager):
            take_over(self)

    made.with_ledger = True  # type: ignore[attr-defined]
    Scheduler.__init__ = made
