"""The general plugin: every vLLM engine of this environment gets a ledger, without any flag.

vLLM loads plugins of the group ``vllm.general_plugins`` in each of its processes before it makes a scheduler;
``VLLM_PLUGINS`` restricts which. Installing kvledger alone changes nothing: ``KVLEDGER_VLLM=1`` switches this one on,
``KVLEDGER_RECORD=name`` records instead.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from kvledger.config import ConfigError


def register() -> None:
    """Let schedulers take a ledger as they are made (``KVLEDGER_VLLM=1``), or record them (``KVLEDGER_RECORD=name``).

    Raises:
        ConfigError: both are set.
    """
    replacing, recorded = os.environ.get("KVLEDGER_VLLM") == "1", os.environ.get("KVLEDGER_RECORD", "")
    if not replacing and not recorded:
        return
    if replacing and recorded:
        raise ConfigError("KVLEDGER_VLLM replaces vLLM's manager, KVLEDGER_RECORD leaves it: set one of them")
    from vllm.v1.core.sched.scheduler import Scheduler

    from kvledger.adapters.vllm.manager import LedgerKVCacheManager
    from kvledger.adapters.vllm.scheduler import record, take_over

    own = Scheduler.__init__
    if getattr(own, "with_ledger", False):
        return

    @functools.wraps(own)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        if recorded:
            record(self, recorded)
        elif not isinstance(self.kv_cache_manager, LedgerKVCacheManager):
            take_over(self)

    made.with_ledger = True  # type: ignore[attr-defined]
    Scheduler.__init__ = made
