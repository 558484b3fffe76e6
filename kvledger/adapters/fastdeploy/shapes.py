"""How large a block is: FastDeploy's attention backends say, else its configuration."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kvledger.adapters.fastdeploy.pool import DevicePool

_ITEM_BYTES = {"uint8": 1, "int8": 1, "float8_e4m3fn": 1, "block_wise_fp8": 1, "int4_zp": 1, "float32": 4}
"""By type of an element; all others have two."""


class CacheShapes(DevicePool):
    """Shapes of the KV tensors and bytes of a block. See the subclass."""

    def _attention(self) -> Callable[..., Any] | None:
        """The class of the attention backend: the one that was given, else FastDeploy's where it is loaded."""
        if self.attention_backend is not None or "fastdeploy" not in sys.modules:
            return self.attention_backend
        try:
            module = importlib.import_module("fastdeploy.model_executor.layers.attention")
        except ImportError:  # a FastDeploy that has none, and no layers that it could be asked for
            return None
        chosen: Callable[..., Any] = module.get_attention_backend()
        return chosen

    def _quantization(self) -> str | None:
        """How KV is stored in 8 or 4 bits, ``None`` where it is not."""
        kind: str | None = getattr(getattr(self.config, "quant_config", None), "kv_cache_quant_type", None)
        return kind

    def _get_kv_cache_shape(self, max_block_num: int) -> tuple[list[int], list[int]]:
        """Shapes of one layer's key and value cache: the attention backend's, else those of paged attention.

        Attention backends that keep keys and values in one (MLA) have no value cache: its shape is empty.
        """
        model, tp = self.config.model_config, self.config.parallel_config.tensor_parallel_size
        kv_heads = max(1, int(model.num_key_value_heads) // tp)
        attention = self._attention()
        if attention is None:
            shape = [max_block_num, kv_heads, self._block_size, int(model.head_dim)]
            return shape, list(shape)
        backend = attention(
            self.config,
            kv_num_heads=kv_heads,
            num_heads=model.num_attention_heads // tp,
            head_dim=model.head_dim,
            encoder_block_shape_q=64,
            decoder_block_shape_q=16,
        )
        key, value = backend.get_kv_cache_shape(max_num_blocks=max_block_num, kv_cache_quant_type=self._quantization())
        return list(key), list(value or [])

    def _block_bytes(self, cache_config: Any, shapes: Sequence[Sequence[int]] | None = None) -> int:
        """Bytes of one block in one layer of one rank, a multiple of 8.

        What an attention backend says counts more than ``bytes_per_layer_per_block``, which FastDeploy reckons for
        paged attention in 16 bits, whatever the backend and the quantization are.
        """
        size = 0
        if self._attention() is None:
            size = int(getattr(cache_config, "bytes_per_layer_per_block", 0) or 0)
        if not size and shapes is None and hasattr(self.config, "model_config"):
            shapes = self._get_kv_cache_shape(1)
        if not size and shapes is not None:
            size = self._bytes_of(cache_config, [[1, *shape[1:]] for shape in shapes if shape])
        return size + -size % 8

    def _bytes_of(self, cache_config: Any, shapes: Sequence[Sequence[int]]) -> int:
        kind = self._quantization()
        item = 1 if kind else _ITEM_BYTES.get(str(getattr(cache_config, "cache_dtype", "")), 2)
        size = item * sum(map(math.prod, shapes))
        if kind == "block_wise_fp8":  # beside the values, a scale per head and token in the model's own type
            model_dtype = str(getattr(self.config.model_config, "dtype", ""))
            size += _ITEM_BYTES.get(model_dtype, 2) * sum(math.prod(shape[:3]) for shape in shapes)
        return size
