"""A complete vLLM engine on a CPU, with a small random model: ``python -m tests.vllm.complete MODE [OURS]``.

Prints what it generated as JSON, with what the scheduler did. The model is made here (nothing is fetched): untied
embeddings and a wide initialisation, so that KV read from a wrong block gives other tokens.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
BLOCK = 32
MODES: dict[str, dict[str, Any]] = {
    "cached": {"num_gpu_blocks_override": 200},
    "uncached": {"num_gpu_blocks_override": 200, "enable_prefix_caching": False},
    "preempted": {"num_gpu_blocks_override": 30, "max_num_seqs": 6},
    "chunked": {"num_gpu_blocks_override": 200, "max_num_batched_tokens": 128, "enable_chunked_prefill": True},
    "asynchronous": {"num_gpu_blocks_override": 60, "async_scheduling": True},
    "drafts": {
        "num_gpu_blocks_override": 100,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    },
    "priority": {"num_gpu_blocks_override": 30, "max_num_seqs": 6, "scheduling_policy": "priority"},
}


def model() -> str:
    """A Llama of two layers, and where it lies."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.5,
        tie_word_embeddings=False,
    )
    folder = tempfile.mkdtemp()
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prompts(seed: int, count: int) -> list[list[int]]:
    """Prompts that share beginnings."""
    draw = random.Random(seed)
    stems = [[draw.randrange(500) for _ in range(draw.randrange(40, 200))] for _ in range(4)]
    return [draw.choice(stems) + [draw.randrange(500) for _ in range(draw.randrange(1, 90))] for _ in range(count)]


def main(mode: str, ours: bool) -> None:
    """Generate, and say what."""
    from vllm import LLM, SamplingParams

    options = dict(MODES[mode])
    if ours and os.environ.get("KVLEDGER_VLLM") != "1":
        kind = "LedgerAsyncScheduler" if options.get("async_scheduling") else "LedgerScheduler"
        options["scheduler_cls"] = f"kvledger.adapters.vllm.{kind}"
    elif not options.get("async_scheduling"):
        options["async_scheduling"] = False
    llm = LLM(
        model(),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=640,
        block_size=BLOCK,
        seed=0,
        **{"max_num_seqs": 8, "enable_prefix_caching": True, **options},
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    texts: list[list[int]] = []
    told: dict[str, Any] = {"manager": type(scheduler.kv_cache_manager).__name__}
    for batch in range(2):  # the second finds what the first has left
        given = [{"prompt_token_ids": tokens} for tokens in prompts(batch, 40)]
        draw = random.Random(batch)
        asked = [
            SamplingParams(temperature=0.0, max_tokens=draw.randrange(4, 40), ignore_eos=True, detokenize=False)
            for _ in given
        ]
        urgent = [draw.randrange(3) for _ in given] if mode == "priority" else None
        outputs = llm.generate(given, asked, use_tqdm=False, priority=urgent)
        texts += [list(output.outputs[0].token_ids) for output in outputs]
        told.setdefault("hits", []).append(sum(output.num_cached_tokens or 0 for output in outputs))
    told["reset"] = llm.reset_prefix_cache()
    ledger = getattr(scheduler.kv_cache_manager, "ledger", None)
    if ledger is not None:
        from statemachine.check import check

        told["left"] = len(ledger.state.requests)
        told["broken"] = check(ledger.state)
        told["free"] = ledger.available_blocks() == ledger.config.device_blocks
        told["preempted"] = preemptions(ledger.name)
        ledger.close()
    print(json.dumps({"texts": texts, **told}))


def preemptions(name: str) -> int:
    """How often a request was preempted, counted in the log."""
    from ipc import LogReader
    from statemachine.events import ReleaseReason, RequestReleased
    from statemachine.records.replay import event_of

    reader = LogReader(name)
    events = [event_of(record) for record in reader.poll()]
    reader.close()
    return sum(isinstance(event, RequestReleased) and event.reason == ReleaseReason.PREEMPTED for event in events)


if __name__ == "__main__":
    main(sys.argv[1], "ours" in sys.argv[2:])
