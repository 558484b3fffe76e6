"""Drop-in for FastDeploy's prefix cache manager: the scheduler-facing names of the original over :class:`CacheManager`.

Names, argument order, return shapes and metric names are FastDeploy's (the version with ``cal_block_hash``); nothing of
FastDeploy or Paddle is imported. ``docs/fastdeploy.md`` says what differs. Words: ``docs/glossary.md``.
"""

from kvledger.adapters.fastdeploy.cache_data import BlockNode, CacheStatus
from kvledger.adapters.fastdeploy.metrics import CacheMetrics, main_process_metrics
from kvledger.adapters.fastdeploy.prefix_cache_manager import PrefixCacheManager
from kvledger.adapters.fastdeploy.signals import (
    SIGNALS,
    ExistTaskStatus,
    IPCSignal,
    KVCacheStatus,
    ModelWeightsStatus,
    PrefixTreeStatus,
)
from kvledger.adapters.fastdeploy.transfer_queue import EngineCacheQueue

__all__ = [
    "SIGNALS",
    "BlockNode",
    "CacheMetrics",
    "CacheStatus",
    "EngineCacheQueue",
    "ExistTaskStatus",
    "IPCSignal",
    "KVCacheStatus",
    "ModelWeightsStatus",
    "PrefixCacheManager",
    "PrefixTreeStatus",
    "main_process_metrics",
]
