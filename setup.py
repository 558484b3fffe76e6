"""Build step of the distribution: everything else is in ``pyproject.toml``.

With ``KVLEDGER_NATIVE=1`` in the environment the state machine is compiled by mypyc (it touches nothing outside itself,
so it loses nothing), as black and mypy do with their own wheels. That needs a C compiler. Without it kvledger is pure
Python, which is what one edits, debugs and breaks on purpose; both give the same events and the same digests.
"""

import os

from setuptools import setup

NATIVE = [
    "apply",
    "apply_cache",
    "apply_chunks",
    "apply_requests",
    "apply_transfers",
    "backup",
    "check",
    "decide",
    "decide_chunks",
    "decide_epoch",
    "decide_upkeep",
    "encoding",
    "expect",
    "incremental",
    "order",
    "ownership",
    "room",
    "state",
    "tree",
]
"""Modules with logic. The others are tables, exceptions (which mypyc cannot compile), or made at import."""

if os.environ.get("KVLEDGER_NATIVE") == "1":
    try:
        from mypyc.build import mypycify
    except ModuleNotFoundError as error:
        setup(setup_requires=["mypy>=1.11"])  # ends here where pip only asks what the build needs
        raise SystemExit("KVLEDGER_NATIVE=1 needs mypy: install it, or let pip isolate the build") from error
    files = [f"statemachine/{name}.py" for name in NATIVE]
    setup(ext_modules=mypycify(["--config-file", "pyproject.toml", *files]))
else:
    setup()
