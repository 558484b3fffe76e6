"""A complete vLLM engine on a CPU, with a small random model: ``python -m tests.vllm.complete MODE [ours]``.

Prints what it generated as JSON, with what the scheduler did. The model is made here (nothing is fetched): untied
embeddings and a wide initialisation, so that KV read from a wrong block gives other tokens.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from pathlib import Path
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
    "adapters": {"num_gpu_blocks_override": 100, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8},
    "embeddings": {"num_gpu_blocks_override": 100, "enable_prompt_embeds": True},
    "thousand": {"num_gpu_blocks_override": 60, "max_num_seqs": 16},
    "turbulent": {"num_gpu_blocks_override": 40, "max_num_seqs": 6},
}
HIDDEN, LAYERS = 64, 2


def model() -> str:
    """A Llama of two layers, and where it lies."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
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


def adapter(seed: int) -> str:
    """A LoRA adapter of the attention of that model, and where it lies; as widely initialised."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for part in ("q_proj", "v_proj"):
            path = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            weights[f"{path}.lora_A.weight"] = torch.randn(8, HIDDEN)
            weights[f"{path}.lora_B.weight"] = torch.randn(HIDDEN, 8)
    folder = tempfile.mkdtemp()
    save_file(weights, f"{folder}/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    return folder


def prompts(seed: int, count: int) -> list[list[int]]:
    """Prompts that share beginnings."""
    draw = random.Random(seed)
    stems = [[draw.randrange(500) for _ in range(draw.randrange(40, 200))] for _ in range(4)]
    return [draw.choice(stems) + [draw.randrange(500) for _ in range(draw.randrange(1, 90))] for _ in range(count)]


def wishes(seed: int, count: int, longest: int = 40) -> list[Any]:
    """How much is to be generated for so many prompts."""
    from vllm import SamplingParams

    draw = random.Random(seed)
    lengths = [draw.randrange(4, longest) for _ in range(count)]
    return [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]


def served(llm: Any, mode: str, batch: int) -> tuple[list[list[int]], int]:
    """One batch, generated at once: the tokens of each, and how many were found cached."""
    count = 500 if mode == "thousand" else 40
    draw = random.Random(batch)
    given: list[Any] = [{"prompt_token_ids": tokens} for tokens in prompts(batch, count)]
    more: dict[str, Any] = {}
    if mode == "priority":
        more["priority"] = [draw.randrange(3) for _ in given]
    if mode == "adapters":
        from vllm.lora.request import LoRARequest

        adapters = [None, *(LoRARequest(f"adapter {seed}", seed, adapter(seed)) for seed in (1, 2))]
        more["lora_request"] = [draw.choice(adapters) for _ in given]
    if mode == "embeddings":  # every other prompt comes as numbers, the same ones again and again
        import torch

        torch.manual_seed(0)
        table = torch.randn(512, HIDDEN)
        given[::2] = [{"prompt_embeds": table[prompt["prompt_token_ids"]]} for prompt in given[::2]]
    outputs = llm.generate(given, wishes(batch, count, 12 if count > 40 else 40), use_tqdm=False, **more)
    hits = sum(output.num_cached_tokens or 0 for output in outputs)
    return [list(output.outputs[0].token_ids) for output in outputs], hits


def stepped(llm: Any, _: str, batch: int) -> tuple[list[list[int]], int]:
    """One batch, step by step, with clients that leave and resets in which all are preempted and begin again."""
    engine, draw = llm.llm_engine, random.Random(batch)
    waiting = [*zip(prompts(batch, 40), wishes(batch, 40), strict=True)]
    texts: dict[str, list[int]] = {}
    hits = steps = 0
    while waiting or engine.has_unfinished_requests():
        steps += 1
        if waiting and steps % 2:
            tokens, wish = waiting.pop()
            name = f"{batch}-{len(waiting)}"
            engine.add_request(name, {"prompt_token_ids": tokens}, wish)
            texts[name] = []
        for output in engine.step():
            texts[output.request_id] = list(output.outputs[0].token_ids)
            hits += (output.num_cached_tokens or 0) if output.finished else 0
        if steps % 7 == 0:
            engine.abort_request([draw.choice(sorted(texts))])
        if steps % 40 == 0:
            assert llm.reset_prefix_cache(reset_running_requests=True)
    return list(texts.values()), hits


def main(mode: str, ours: bool) -> None:
    """Generate, and say what."""
    from vllm import LLM

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
    told: dict[str, Any] = {"manager": type(scheduler.kv_cache_manager).__name__, "hits": []}
    for batch in range(2):  # the second finds what the first has left
        generated, hits = (stepped if mode == "turbulent" else served)(llm, mode, batch)
        texts += generated
        told["hits"].append(hits)
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
