"""Models' configurations: what the tables know is right to the byte, and what they do not know is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvledger import CacheConfig, ConfigError, HostPolicy
from kvledger.models import ModelError, shape_of, size
from tests.waiting import PATIENCE_S

LLAMA_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 131072,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}
GEMMA_3 = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "torch_dtype": "bfloat16",
    },
}


@pytest.mark.parametrize(
    ("config", "ranks", "per_token"),
    [  # bytes per token: known figures, 2 tensors x heads x size of a head x 2 bytes x layers
        (LLAMA_8B, 1, 128 << 10),
        (LLAMA_8B, 2, 64 << 10),
        (LLAMA_8B, 16, 16 << 10),  # fewer heads than ranks: each has a copy of one
        (DEEPSEEK_V3, 1, 61 * 576 * 2),
        (DEEPSEEK_V3, 8, 61 * 576 * 2),  # the latent is the same on every rank
        (DEEPSEEK_V3 | {"model_type": "deepseek_v32", "index_head_dim": 128}, 1, 61 * (576 * 2 + 132)),
        ({**LLAMA_8B, "model_type": "qwen3", "head_dim": 64}, 1, 64 << 10),
    ],
)
def test_bytes_per_token(config: dict[str, Any], ranks: int, per_token: int) -> None:
    for block_size in (16, 64):
        shape = shape_of(config, block_size=block_size, ranks=ranks)
        assert shape.block_bytes == block_size * per_token and [layers.kind for layers in shape.layers] == ["full"]


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (GEMMA_3, {0: 2, 1024: 10}),
        ({**LLAMA_8B, "model_type": "gemma2", "sliding_window": 4096}, {0: 16, 4096: 16}),
        ({**LLAMA_8B, "model_type": "mistral", "sliding_window": None}, {0: 32}),
        ({**LLAMA_8B, "model_type": "mistral", "sliding_window": 4096}, {4096: 32}),
        ({**LLAMA_8B, "model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, {0: 32}),
        (
            {**LLAMA_8B, "model_type": "qwen2"}
            | {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28},
            {0: 28, 4096: 4},
        ),
        (
            {**LLAMA_8B, "model_type": "gpt_oss", "num_hidden_layers": 2, "sliding_window": 128}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            {0: 1, 128: 1},
        ),
    ],
)
def test_kinds_of_layers(config: dict[str, Any], windows: dict[int, int]) -> None:
    shape = shape_of(config, block_size=16)
    assert {layers.window: layers.number for layers in shape.layers} == windows


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "has no model_type"),
        ({**LLAMA_8B, "model_type": "brand_new"}, "'brand_new' is not known here"),
        ({**LLAMA_8B, "model_type": "qwen3_next"}, "'qwen3_next' is not known here"),
        ({**LLAMA_8B, "num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ({**LLAMA_8B, "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({**LLAMA_8B, "torch_dtype": "int4"}, "dtype 'int4'"),
        ({"model_type": "llama", "num_hidden_layers": 2}, "has no num_key_value_heads"),
        (
            {**LLAMA_8B, "model_type": "gpt_oss", "sliding_window": 8, "layer_types": ["x"] * 32},
            "do not name 32 layers",
        ),
        ({**LLAMA_8B, "model_type": "gpt_oss", "sliding_window": 8, "layer_types": 5}, "do not name 32 layers"),
        ({**LLAMA_8B, "model_type": "gemma2"}, "has no sliding_window"),
        (
            {**LLAMA_8B, "model_type": "gemma2", "sliding_window": 8, "sliding_window_pattern": "LLG"},
            "sliding_window_pattern is 'LLG'",
        ),
    ],
)
def test_what_is_not_known_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        shape_of(config, block_size=16)
    with pytest.raises(ConfigError, match=told):
        CacheConfig.for_model(config, memory=1 << 30)


def test_heads_that_cannot_be_divided() -> None:
    with pytest.raises(ModelError, match="8 key-value heads cannot be divided among 3 ranks"):
        shape_of(LLAMA_8B, block_size=16, ranks=3)


def test_a_configuration_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    config = CacheConfig.for_model(
        tmp_path, memory=40 << 30, host_memory=90 << 30, ranks=2, block_size=32, transfer_timeout_s=5
    )
    assert (config.layers, config.ranks, config.block_size, config.transfer_timeout_s) == (32, 2, 32, 5)
    block = 32 * (64 << 10)
    assert config.layers * config.block_bytes == block and config.device_blocks == (40 << 30) // block
    assert config.host_policy == HostPolicy.EXCLUSIVE
    resident = (config.host_blocks + config.staging_blocks) * block
    assert (90 << 30) - 3 * block < resident <= 90 << 30
    assert [tensor.shape for tensor in config.tensors] == [(4, 32, 128)] * 2
    assert CacheConfig.for_model(LLAMA_8B, memory=1 << 30).host_policy == HostPolicy.OFF


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"memory": 1000}, "one block of llama takes 2,097,152 bytes per rank, there are 1,000"),
        ({"model": "/nowhere"}, "/nowhere cannot be read"),
        ({"model": __file__}, "is no JSON"),
        ({"model": GEMMA_3}, r"layers of several kinds .* groups=\(full\(\), window\(\d+, blocks=\.\.\.\)\)"),
        ({"block_size": 1 << 27}, "block"),
        ({"memory": 1 << 60}, "more than a pool may have"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        CacheConfig.for_model(**{"model": LLAMA_8B, "memory": 1 << 30, **changes})


def test_size_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def told(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvledger.cli", "size", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)

    done = told("--model", str(tmp_path), "--memory", "64GiB", "--host-memory", "100GB")
    assert done.returncode == 0 and "32,768 (64.0 GiB per rank)" in done.stdout and "4.0 prompts" in done.stdout
    done = told("--model", str(tmp_path), "--memory", "64GiB", "--json")
    expected = size(shape_of(LLAMA_8B, block_size=16), block_size=16, memory=64 << 30)._asdict()
    assert json.loads(done.stdout).items() >= expected.items()
    amounts = ("--memory", "64GiB", "--host-memory", "8GiB", "--ranks", "4", "--retain", "1GiB", "--json")
    found = json.loads(told("--model", str(tmp_path), *amounts).stdout)
    assert found["log_bytes"] == (1 << 30) + (32 << 20)
    assert found["shared_bytes"] == 4 * found["host_bytes"] + found["log_bytes"] + found["snapshot_bytes"]
    for arguments, error in (
        (["--model", str(tmp_path), "--memory", "much"], "is no amount of memory"),
        (["--model", str(tmp_path / "x"), "--memory", "1GiB"], "cannot be read"),
        (["--model", str(tmp_path), "--memory", "1K"], "one block of llama"),
    ):
        done = told(*arguments)
        assert done.returncode == 2 and error in " ".join(done.stderr.replace("│", " ").split()), done
