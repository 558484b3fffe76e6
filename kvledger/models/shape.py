"""The KV cache of a model, read from its ``config.json``: which kinds of layers, with which tensors per block.

Facts about architectures come from the model files of vLLM 0.33 and the configuration classes of transformers; each
table entry says which keys decide. A model that is not in the tables is refused: a guessed layout would be wrong bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from workers.pools.layout import ITEM_BYTES, KVTensor, key_value, latent

_BY_HAND = (
    "write it by hand: CacheConfig(layers=..., tensors=key_value(kv_heads, block_size, head_dim, dtype)), docs/pools.md"
)
_PLAIN = frozenset(
    {"baichuan", "cohere", "deepseek", "ernie4_5", "ernie4_5_moe", "gemma", "glm", "glm4", "glm4_moe", "gpt_neox"}
    | {"granite", "granitemoe", "internlm2", "internlm3", "llama", "minicpm", "mixtral", "nemotron", "olmo", "olmo2"}
    | {"olmoe", "phi", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "stablelm"}
)
"""Full attention in every layer, whatever else their configuration says."""
_MAY_SLIDE = frozenset({"mistral", "phi3", "qwen2", "starcoder2"})
"""Full attention unless ``sliding_window`` is in force (``use_sliding_window`` where there is such a key)."""
_PATTERNS = {"cohere2": 4, "gemma2": 2, "gemma3_text": 6, "gpt_oss": 2, "olmo3": 4}
"""``layer_types`` names each layer ``full_attention`` or ``sliding_attention``; without it every so-many-th is full."""
_FULL, _SLIDING = "full_attention", "sliding_attention"
_LATENT = frozenset({"deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"})
"""Multi-head latent attention: one latent of ``kv_lora_rank`` and one rotary key per token, the same on every rank."""
_INDEXER_GROUP = 128
"""Elements of an indexer key that share one float32 scale (DeepSeek V3.2)."""


class ModelError(ValueError):
    """A model's configuration does not say what its KV cache looks like, or nothing fits in the memory."""


class Layers(NamedTuple):
    """Layers of one kind."""

    kind: str
    """``full`` or ``window``."""
    number: int
    window: int
    """Tokens that a layer of a window attends to, itself included; 0: all."""
    tensors: tuple[KVTensor, ...]
    """Of one layer on one rank."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer of one rank."""
        return sum(tensor.block_bytes for tensor in self.tensors)


class ModelShape(NamedTuple):
    """The KV cache of a model on one tensor-parallel rank."""

    model_type: str
    dtype: str
    layers: tuple[Layers, ...]
    """By kind, full attention first."""
    longest: int
    """Tokens of the longest prompt that the model was made for; 0: it does not say."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers of one rank."""
        return sum(layers.number * layers.block_bytes for layers in self.layers)


def shape_of(
    source: str | Path | Mapping[str, Any], *, block_size: int, ranks: int = 1, dtype: str | None = None
) -> ModelShape:
    """Read a model's configuration.

    Args:
        source: ``config.json``, the folder it lies in, or what is in it.
        block_size: tokens per block.
        ranks: tensor-parallel ranks; key-value heads are divided among them, or repeated where there are fewer.
        dtype: element type of the cache; default: the model's own.

    Raises:
        ModelError: saying what is missing, and what to write by hand.
    """
    config = _text_part(_loaded(source))
    model = str(config.get("model_type", ""))
    if not model:
        raise ModelError(f"this configuration has no model_type: {_BY_HAND}")
    kind = dtype or str(config.get("dtype", config.get("torch_dtype", "bfloat16"))).removeprefix("torch.")
    if kind not in ITEM_BYTES:
        raise ModelError(f"dtype {kind!r} of {model!r} is none of {', '.join(ITEM_BYTES)}: give the cache's as dtype")
    count = _whole(config, "num_hidden_layers")
    layers: tuple[Layers, ...]
    if model in _LATENT:
        tensors = latent(block_size, _whole(config, "kv_lora_rank"), _whole(config, "qk_rope_head_dim"), kind)
        if model == "deepseek_v32":
            width = _whole(config, "index_head_dim")
            shape = (block_size, width + width // _INDEXER_GROUP * 4)
            tensors += (KVTensor("indexer", shape, "uint8"),)
        layers = (Layers("full", count, 0, tensors),)
    else:
        tensors = key_value(_heads_of_a_rank(config, ranks), block_size, _head_dim(config), kind)
        windows = _windows(model, config, count)
        layers = tuple(
            Layers("window" if window else "full", windows.count(window), window, tensors)
            for window in sorted({*windows})
        )
    return ModelShape(model, kind, layers, int(config.get("max_position_embeddings") or 0))


def _loaded(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): name a local config.json or its folder") from error
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, not the configuration of a model")
    return config


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part about the language model, where a configuration has others for images and sounds."""
    for name in ("text_config", "llm_config", "language_config"):
        part = config.get(name)
        if isinstance(part, Mapping):
            return part
    return config


def _whole(config: Mapping[str, Any], name: str, *others: str) -> int:
    for key in (name, *others):
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
        if value is not None:
            raise ModelError(f"{key} is {value!r:.80} in this configuration, not a whole number from 1")
    raise ModelError(f"this configuration of {config.get('model_type')!r} has no {name}: {_BY_HAND}")


def _heads_of_a_rank(config: Mapping[str, Any], ranks: int) -> int:
    if type(ranks) is not int or ranks < 1:
        raise ModelError(f"ranks are a whole number from 1, not {ranks!r:.80}")
    heads = _whole(config, "num_key_value_heads", "num_attention_heads", "n_head")
    if heads % ranks and ranks % heads:
        raise ModelError(f"{heads} key-value heads cannot be divided among {ranks} ranks: take a divisor or a multiple")
    return max(heads // ranks, 1)


def _head_dim(config: Mapping[str, Any]) -> int:
    if config.get("head_dim") is not None:
        return _whole(config, "head_dim")
    return _whole(config, "hidden_size", "n_embd") // _whole(config, "num_attention_heads", "n_head")


def _windows(model: str, config: Mapping[str, Any], count: int) -> list[int]:
    """Per layer, the window in tokens; 0: full attention."""
    types = config.get("layer_types")
    if model in _PLAIN or (
        model in _MAY_SLIDE and (not config.get("sliding_window") or config.get("use_sliding_window") is False)
    ):
        return [0] * count
    window = _whole(config, "sliding_window") if model in _MAY_SLIDE or model in _PATTERNS else 0
    if not window:
        raise ModelError(f"model_type {model!r} is not known here, and a guess could be wrong bytes: {_BY_HAND}")
    if types is not None:
        if not isinstance(types, list) or len(types) != count or not {*types} <= {_FULL, _SLIDING}:
            raise ModelError(
                f"layer_types of this {model!r} do not name {count} layers {_FULL} or {_SLIDING}: {_BY_HAND}"
            )
        return [window if kind == _SLIDING else 0 for kind in types]
    if model in _MAY_SLIDE:
        full = _whole(config, "max_window_layers") if config.get("use_sliding_window") else 0
        return [0 if layer < full else window for layer in range(count)]
    every = config.get("sliding_window_pattern", _PATTERNS[model])
    if type(every) is not int or every < 1:
        raise ModelError(f"sliding_window_pattern is {every!r:.80} in this {model!r}, not a whole number: {_BY_HAND}")
    return [window if (layer + 1) % every else 0 for layer in range(count)]
