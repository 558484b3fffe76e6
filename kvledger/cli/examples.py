"""What ``kvledger COMMAND --help`` ends with: command lines to begin with. A test reads each as it would be typed."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "audit": ("kvledger audit NAME", "kvledger audit NAME --once --json"),
    "bisect": (
        "kvledger bisect night.kvlog --predicate 'len(requests) > 64'",
        "kvledger bisect night.kvlog --predicate 'counters.host_hit_blocks > 0' --stays",
    ),
    "check": ("kvledger check night.kvlog", "kvledger check NAME --from step:4711 --json"),
    "diff": ("kvledger diff yesterday.kvlog today.kvlog", "kvledger diff night.kvlog@160 night.kvlog@step:36"),
    "doctor": ("kvledger doctor", "kvledger doctor --json"),
    "events": ("kvledger events NAME --topic kv@pod-1@model",),
    "explain": (
        "kvledger explain night.kvlog request chat-36",
        "kvledger explain NAME block 17",
        "kvledger explain night.kvlog block 24 --tier host --at 11:00:00.9",
    ),
    "export": (
        "kvledger export night.kvlog night.parquet --to parquet",
        "kvledger export NAME a.pftrace --to perfetto",
    ),
    "leaks": ("kvledger leaks NAME --idle 60", "kvledger leaks night.kvlog --at step:900 --json"),
    "log": (
        "kvledger log NAME --follow --kind Transfer",
        "kvledger log night.kvlog --request chat-36",
        "kvledger log night.kvlog --block 17 --tier host --from step:100",
    ),
    "metrics": ("kvledger metrics NAME --port 9477",),
    "misses": ("kvledger misses night.kvlog", "kvledger misses NAME --from 11:00:00 --json"),
    "pushes": ("kvledger pushes NAME --most 10",),
    "record": ("kvledger record NAME night.kvlog", "kvledger record NAME night.kvlog --rotate-mb 512"),
    "redact": ("kvledger redact night.kvlog to-send.kvlog --key-file our.key",),
    "replay": ("kvledger replay night.kvlog", "kvledger replay night.kvlog --decide"),
    "run": (
        "kvledger run",
        "kvledger run --requests 2000 --device-blocks 256 --record run.kvlog",
        "kvledger run --crash engine@500 --crash worker:0@900",
    ),
    "segments": ("kvledger segments", "kvledger segments --remove-dead"),
    "show": (
        "kvledger show NAME",
        "kvledger show night.kvlog --at 164 --request chat-34",
        "kvledger show night.kvlog --block 17",
    ),
    "shrink": ("kvledger shrink broken.kvlog -o test_broken.py",),
    "simulate": ("kvledger simulate --runs 100", "kvledger simulate --seed 4711 --runs 1 --split"),
    "size": ("kvledger size --model ./model --memory 64GiB --ranks 8",),
    "spans": ("kvledger spans NAME --endpoint http://127.0.0.1:4318/v1/traces",),
    "top": ("kvledger top NAME", "kvledger top NAME --once"),
    "view": ("kvledger view NAME", "kvledger view night.kvlog --export night.html --from step:1 --to step:90"),
    "what-if": (
        "kvledger what-if night.kvlog --device-blocks 1000,2000,4000 --host-blocks 0,8000",
        "kvledger what-if night.kvlog --curve --plot curve.svg",
    ),
}


def epilog(command: str) -> str:
    """The examples of a command, as its help ends with them."""
    return "Examples:\n\n" + "\n".join(f"- `{line}`" for line in EXAMPLES[command])
