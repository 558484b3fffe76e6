"""Whether what is imported is kvledger, and all of it.

Needs nothing but the standard library: it has to run where kvledger cannot be imported.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib
import importlib.util
import platform
import re
from importlib import metadata
from pathlib import Path

from kvledger.doctor.finding import Finding, note, ok, problem

_DISTRIBUTION = "kvledger"
_PACKAGES = ("statemachine", "ipc", "workers", "kvledger")
_ENTRANCES = ("kvledger.manager.manager", "workers.transfer", "kvledger.run.run")
"""Modules that import all others which an engine, a worker and the command line cannot do without."""
_REINSTALL = "pip install --force-reinstall --no-deps kvledger"
_AGAIN = "then type this again, all further checks need it"
ROOT = Path(__file__).parents[2].resolve()
"""The directory that holds this kvledger, and so has to hold the other three packages."""


def version() -> Finding:
    """Which kvledger this is, and what runs it."""
    import kvledger

    try:
        build = "compiled" if kvledger.is_compiled() else "interpreted"
    except ImportError:
        build = "not whole"
    python = f"{build}, Python {platform.python_version()} on {platform.machine()}"
    try:
        return ok(f"kvledger {metadata.version(_DISTRIBUTION)}, {python}")
    except metadata.PackageNotFoundError:
        return note(f"kvledger in {ROOT}, {python}: not installed, only found on the path", f"pip install {ROOT}")


def packages() -> Finding:
    """Whether all four packages are ours and whole: their names are common, and python-statemachine has one of them."""
    for name in _PACKAGES:
        found = _place(name)
        if found != ROOT / name:
            return problem(
                f"{name} is imported from {found or 'nowhere'}, kvledger's own is in {ROOT}",
                f"uninstall or rename what has the name {name}, or give kvledger an environment of its own"
                if found
                else _REINSTALL,
            )
    others = _others()
    if others:
        names = ", ".join(f"{distribution} ({', '.join(packages)})" for distribution, packages in others.items())
        return problem(
            f"packages of the same name are installed here by {names}: one overwrites or hides the other",
            f"pip uninstall {' '.join(others)}, then {_REINSTALL}; or give kvledger an environment of its own",
        )
    damaged = _damaged()
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        return problem(f"missing, or not as it was installed: {damaged[0]}{more}", _REINSTALL)
    beside = _beside_scripts()
    if beside:
        return note(
            f"{beside} takes the place of kvledger's own package in every script that lies there",
            "rename it, or keep scripts that use kvledger elsewhere",
        )
    return ok(f"{', '.join(_PACKAGES)} are kvledger's own, in {ROOT}")


def _beside_scripts() -> Path | None:
    """What has the name of one of our packages in this folder, which is where Python looks first for a script in it."""
    here = Path.cwd()
    for name in _PACKAGES if here.resolve() != ROOT else ():
        for file in (here / f"{name}.py", here / name / "__init__.py"):
            if file.exists():
                return file
    return None


def _place(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # something without a spec pretends to be it
        return None
    if spec is None:
        return None
    places = spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
    return Path(next(iter(places), "")).resolve()


def _others() -> dict[str, list[str]]:
    """Distributions besides ours that install one of our packages, and which."""
    found: dict[str, list[str]] = {}
    owners = metadata.packages_distributions()
    for package in _PACKAGES:
        for distribution in sorted({*owners.get(package, ())}):
            if re.sub(r"[-_.]+", "-", distribution).lower() != _DISTRIBUTION:
                found.setdefault(distribution, []).append(package)
    return found


def _damaged() -> list[str]:
    """Files that are gone, or not as pip has written them; an editable installation has none that could be told."""
    try:
        own = metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return []
    damaged = []
    # not its ``files``, which leaves out from Python 3.12 on what is missing
    for row in csv.reader((own.read_text("RECORD") or "").splitlines()):
        if len(row) < 2 or not row[1].startswith("sha256=") or row[0].split("/")[0] not in _PACKAGES:
            continue
        try:
            digest = hashlib.sha256(Path(str(own.locate_file(row[0]))).read_bytes()).digest()
        except OSError:
            digest = b""
        if "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != row[1]:
            damaged.append(row[0])
    return damaged


def imports() -> Finding:
    """Whether it can be imported; all further checks need that."""
    for module in _ENTRANCES:
        try:
            importlib.import_module(module)
        except Exception as error:  # a stranger's package may raise anything
            if isinstance(error.__cause__, ImportError):  # what kvledger/__init__.py has met
                error = error.__cause__
            what = f"{module} cannot be imported: {type(error).__name__}: {error}"
            if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] not in _PACKAGES:
                return problem(what, f"a package that kvledger needs is missing: pip install kvledger; {_AGAIN}")
            return problem(what, f"if nothing is said about it above: {_REINSTALL}; {_AGAIN}")
    return ok("kvledger and what it needs can be imported")


def checksums() -> Finding:
    """Whether the processor computes the log's checksums."""
    import crc32c

    if crc32c.hardware_based:
        return ok("CRC-32C in hardware")
    return note(
        "CRC-32C in software: every record of the log costs several times as much",
        "unset CRC32C_SW_MODE, if it is set; else this processor has no CRC instructions",
    )
