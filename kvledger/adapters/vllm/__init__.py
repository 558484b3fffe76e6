"""kvledger in place of vLLM's KV-cache manager, inside vLLM's own scheduler.

::

    vLLM's Scheduler ── schedule(), update_from_output() ── one transaction each
        │ calls of KVCacheManager
        ▼
    LedgerKVCacheManager (manager.py) ── admit, allocate, cache, release ── CacheManager ── log

Or beside it: ``recorder.py`` notes what vLLM's own manager does, and replaces nothing. ``scheduler.py`` has the
classes for ``--scheduler-cls`` and puts the manager in, ``plugin.py`` does the same without any flag, ``settings.py``
reads what is set. Nothing of vLLM is changed but attributes of its scheduler. The rest of kvledger never imports this
package; this package imports vLLM, which has to be installed. Words: ``docs/glossary.md``.
"""

from kvledger.adapters.vllm.scheduler import LedgerAsyncScheduler, LedgerScheduler, record, take_over

__all__ = ["LedgerAsyncScheduler", "LedgerScheduler", "record", "take_over"]
