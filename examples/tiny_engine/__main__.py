"""``python -m examples.tiny_engine``: serve some requests, and compare with what comes without a cache."""

from __future__ import annotations

import time
import warnings
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvledger import ConfigError, HostPolicy, LedgerError, WorkerFailed

_ERRORS = Console(stderr=True)
app = typer.Typer(add_completion=False)


class Policy(StrEnum):
    """Host policies as they are typed."""

    OFF = "off"
    EXCLUSIVE = "exclusive"
    WRITE_THROUGH = "write-through"


@app.command()
def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests; half of them come back for a second turn")] = 24,
    generate: Annotated[int, typer.Option(min=1, help="New tokens per request")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and prompts")] = 0,
    caching: Annotated[bool, typer.Option(help="Use what other requests have cached")] = True,
    drop_in: Annotated[bool, typer.Option(help="FastDeploy's PrefixCacheManager API instead of CacheManager")] = False,
    ranks: Annotated[int, typer.Option(help="Tensor-parallel ranks (1, 2, 4), one transfer worker each")] = 2,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block")] = 8,
    device_blocks: Annotated[int, typer.Option(min=1, help="Blocks of the device pool; few: eviction")] = 48,
    host_blocks: Annotated[int, typer.Option(min=0, help="Blocks of the host pool; 0 = no host tier")] = 96,
    host_policy: Annotated[Policy, typer.Option(help="When blocks are copied to the host")] = Policy.EXCLUSIVE,
    compare: Annotated[bool, typer.Option(help="Serve once more without a cache, and compare the tokens")] = True,
) -> None:
    """Serve some requests with a small random transformer, every key and value of which is read through block tables.

    Exit codes: 0 fine, 1 the tokens differ from those without a cache, 2 impossible settings.
    """
    warnings.filterwarnings("ignore", "No ccache found")  # Paddle speaks of compiling extensions
    try:
        # imported here: Paddle takes seconds, and --help needs none of it
        from examples.tiny_engine.model import Model, ModelConfig
        from examples.tiny_engine.serve import MODEL_RANKS, Mode, prompts, serve, session
    except ImportError as error:
        raise _bad(f"{error}; the example needs Paddle: pip install 'kvledger[paddle]'") from error
    if ranks not in MODEL_RANKS:
        raise _bad(f"--ranks must be one of {MODEL_RANKS}, not {ranks}: the model's key heads are split evenly")
    policy = HostPolicy[host_policy.name] if host_blocks else HostPolicy.OFF
    mode = Mode(
        drop_in=drop_in,
        caching=caching,
        device_blocks=device_blocks,
        host_blocks=host_blocks if policy else 0,
        host_policy=policy,
        ranks=ranks,
        block_size=block_size,
    )
    model = Model(ModelConfig(seed=seed))
    work = prompts(model.config.vocabulary, requests, seed)
    try:
        with session(model, mode) as run:
            begun = time.perf_counter()
            found = serve(run, work, generate)
            seconds = time.perf_counter() - begun
            stats = run.manager.stats()
        expected = None
        if compare:
            roomy = 8 * (128 + 2 * generate) // block_size + 8
            with session(model, Mode(caching=False, block_size=block_size, device_blocks=roomy)) as plain:
                expected = serve(plain, work, generate)
    except (ConfigError, ValueError, LedgerError, WorkerFailed) as error:
        raise _bad(str(error)) from error

    table = Table(title="tiny engine", show_header=False, title_justify="left")
    tokens = sum(len(completion.tokens) for completion in found)
    table.add_row("requests", f"{len(found)} in {seconds:.2f} s, {tokens / seconds:,.0f} new tokens/s")
    table.add_row("tokens computed", f"{run.engine.computed_tokens:,}")
    table.add_row("tokens found in the cache", f"{run.engine.cached_tokens:,}")
    table.add_row("preempted", f"{run.engine.preemptions}")
    for name in ("device_evicted_blocks", "swapped_out_blocks", "swapped_in_blocks", "backed_up_blocks"):
        table.add_row(name.replace("_", " "), f"{stats[name]:,}")
    if expected is not None:
        same = [c.tokens for c in found] == [c.tokens for c in expected]
        table.add_row("tokens without a cache", "identical" if same else "[bold red]DIFFERENT[/]")
        table.add_row("tokens computed without", f"{plain.engine.computed_tokens:,}")
    Console().print(table)
    if expected is not None and not same:
        raise typer.Exit(1)


def _bad(text: str) -> typer.Exit:
    _ERRORS.print(f"[bold red]error[/] {text}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


if __name__ == "__main__":
    app(prog_name="python -m examples.tiny_engine")
