"""``kvledger doctor``: a healthy machine, and each check on one that is sick in that way."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ipc import memory
from ipc.names import SHM
from ipc.ownership import remove_objects
from kvledger.doctor import Finding, Status, limits, optional, processes, shared_memory
from kvledger.doctor.installation import checksums
from kvledger.doctor.ledgers import ledgers
from kvledger.doctor.trial import trial
from tests.doctor.test_segments import DEAD
from tests.ipc.test_limits import in_small_shm
from tests.run.test_run import kvledger
from tests.waiting import PATIENCE_S
from tests.workers.test_cuda import Standin, libraries, use
from workers.pools.cuda_driver import LIBRARY
from workers.pools.numpy import NumpyPools

__all__ = ["libraries"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("statemachine", "ipc", "workers", "kvledger")
NEEDED = ("version", "packages", "imports", "/dev/shm", "segment", "semaphore", "who lives", "worker", "trial")
"""Checks that find nothing wrong wherever these tests run."""
PYTHON = [sys.executable, "-P", "-S"]
"""Without what site-packages says in .pth files: an editable kvledger would stand in for what a test removes."""


@pytest.fixture
def ledger() -> Iterator[str]:
    name = f"doctor-test-{os.getpid()}"
    yield name
    remove_objects(name)


def python_path(path: Sequence[Path]) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([*map(str, path), sysconfig.get_path("purelib")])}


def doctor(
    *,
    python: Sequence[str] = PYTHON,
    path: Sequence[Path] = (ROOT,),
    cwd: Path = ROOT,
    limit: Callable[[], None] | None = None,
    **environment: str,
) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and what it found, by check. ``path``: where the packages are looked for; ``limit``: set before."""
    process = subprocess.Popen(
        [*python, "-m", "kvledger.cli", "doctor", "--json"],
        cwd=cwd,
        env=os.environ | python_path(path) | environment,
        preexec_fn=limit,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        out, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode in (0, 2) and not left_by(process.pid), errors
    answer = json.loads(out)
    found = {check["check"]: check for check in answer["checks"]}
    assert answer["problems"] == sum(check["status"] == "problem" for check in found.values())
    assert process.returncode == (2 if answer["problems"] else 0)
    assert all(check["advice"] or check["status"] == "ok" for check in found.values()), "it says what to do"
    assert not errors
    return process.returncode, found


def expect(finding: Finding, status: Status, *said: str) -> None:
    assert finding.status == status and all(word in finding.found for word in said), finding
    assert bool(finding.advice) == (status != Status.OK)


def left_by(pid: int) -> list[str]:
    return [name for name in os.listdir(SHM) if f"doctor-{pid}-" in name]


def test_a_healthy_machine() -> None:
    code, found = doctor()
    assert code == 0 and all(found[name]["status"] == "ok" for name in NEEDED), found
    assert [*found][-1] == "trial" and "two blocks swapped out and in" in found["trial"]["found"]
    done = kvledger("doctor")
    assert done.returncode == 0 and done.stdout.endswith("kvledger works here\n")
    assert not done.stderr and all(f" {name} " in done.stdout for name in found)


# The installation


@pytest.mark.parametrize("name", ["workers", "ipc", "statemachine"])
def test_a_module_of_that_name_beside_a_users_script(tmp_path: Path, name: str) -> None:
    """The script says which file it is, and the doctor finds it where the script lies, before the script is run."""
    stranger = tmp_path / f"{name}.py"
    script = tmp_path / "script.py"
    script.write_text("import kvledger\nprint(kvledger.CacheManager)\n")
    command = [sys.executable, str(script)]
    environment = os.environ | python_path((ROOT,))
    for broken in (False, True):
        if broken:
            stranger.write_text("mine = 1\n")
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert (done.returncode != 0) == broken
        code, found = doctor(cwd=tmp_path)
        assert code == 0 and found["packages"]["status"] == ("note" if broken else "ok")
    assert f"{stranger} has the name of one of its packages: rename or remove it" in done.stderr
    assert str(stranger) in found["packages"]["found"] and "rename it" in found["packages"]["advice"]


def install(site: Path) -> None:
    """What pip makes of kvledger: files, and a RECORD with their hashes."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    lines = []
    for file in sorted(site.rglob("*.py")):
        digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=").decode()
        lines.append(f"{file.relative_to(site)},sha256={digest},{file.stat().st_size}")
    describe(site, "kvledger", lines)


def describe(site: Path, name: str, record: list[str]) -> None:
    folder = site / f"{name.replace('-', '_')}-9.9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    (folder / "RECORD").write_text("".join(line + "\n" for line in record))


def stranger(site: Path) -> None:
    """A distribution that has the name ``statemachine`` too, as PyPI's python-statemachine does."""
    folder = site / "statemachine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("from .errors import State\nfrom .events import Events\n")
    (folder / "errors.py").write_text("class State: ...\n")
    (folder / "events.py").write_text("class Events: ...\n")
    describe(site, "python-statemachine", [f"statemachine/{name}.py,," for name in ("__init__", "errors", "events")])


def test_an_installation_that_is_whole(tmp_path: Path) -> None:
    install(tmp_path)
    link = tmp_path / "lib64"  # as virtual environments have on some systems
    link.symlink_to(tmp_path)
    for path in (tmp_path, link):
        code, found = doctor(path=[path], cwd=tmp_path)
        assert code == 0 and all(found[name]["status"] == "ok" for name in NEEDED), found
        assert "kvledger 9.9, interpreted" in found["version"]["found"]
        assert f"kvledger's own, in {tmp_path.resolve()}" in found["packages"]["found"]


def test_a_strangers_statemachine_is_imported(tmp_path: Path) -> None:
    install(tmp_path / "ours")
    stranger(tmp_path / "theirs")
    path = [tmp_path / "theirs", tmp_path / "ours"]
    code, found = doctor(path=path, cwd=tmp_path)
    assert code == 2 and [*found] == ["version", "packages", "imports"], "it runs all the same, as far as it can"
    assert "kvledger 9.9, not whole" in found["version"]["found"]
    assert str(tmp_path / "theirs" / "statemachine") in found["packages"]["found"]
    assert "statemachine" in found["imports"]["found"]
    environment = os.environ | python_path(path)
    for arguments, code in (("-m kvledger.cli segments", 2), ("-c from\tkvledger\timport\tCacheManager", 1)):
        command = [*PYTHON, *(word.replace("\t", " ") for word in arguments.split(" "))]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == code
        last = done.stderr.splitlines()[-1]
        assert "kvledger is not whole here (" in last and last.endswith("run kvledger doctor"), done.stderr
        assert code == 1 or done.stderr.count("\n") == 1


def test_both_are_installed_and_ours_comes_first(tmp_path: Path) -> None:
    install(tmp_path / "ours")
    stranger(tmp_path / "theirs")
    code, found = doctor(path=[tmp_path / "ours", tmp_path / "theirs"], cwd=tmp_path)
    assert code == 2 and [name for name in found if found[name]["status"] == "problem"] == ["packages"]
    assert "python-statemachine (statemachine)" in found["packages"]["found"]
    assert "pip uninstall python-statemachine, then" in found["packages"]["advice"]


def test_one_over_the_other_and_what_its_removal_leaves(tmp_path: Path) -> None:
    install(tmp_path)
    stranger(tmp_path)
    code, found = doctor(path=[tmp_path], cwd=tmp_path)
    assert code == 2 and "python-statemachine (statemachine)" in found["packages"]["found"]
    shutil.rmtree(tmp_path / "python_statemachine-9.9.dist-info")
    code, found = doctor(path=[tmp_path], cwd=tmp_path)
    assert code == 2 and "statemachine/__init__.py and 2 more" in found["packages"]["found"]
    for name in ("__init__", "errors", "events"):
        (tmp_path / "statemachine" / f"{name}.py").unlink()
    code, found = doctor(path=[tmp_path], cwd=tmp_path)
    assert (
        code == 2
        and "missing, or not as it was installed: statemachine/__init__.py and 2 more" in found["packages"]["found"]
    )
    assert found["imports"]["status"] == "problem" and "--force-reinstall" in found["packages"]["advice"]


def test_a_dependency_is_missing(tmp_path: Path) -> None:
    (tmp_path / "xxhash.py").write_text("raise ModuleNotFoundError(\"No module named 'xxhash'\", name='xxhash')\n")
    code, found = doctor(path=[tmp_path, ROOT])
    assert code == 2 and "No module named 'xxhash'" in found["imports"]["found"]
    assert found["packages"]["status"] == "ok" and "missing: pip install kvledger; " in found["imports"]["advice"]


def test_checksums_in_software(monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = doctor(CRC32C_SW_MODE="force")
    assert code == 0 and found["crc32c"]["status"] == "note"
    assert "software" in found["crc32c"]["found"] and "CRC32C_SW_MODE" in found["crc32c"]["advice"]
    monkeypatch.setattr("crc32c.hardware_based", True)
    expect(checksums(), Status.OK, "hardware")


# Shared memory


def test_a_full_shm() -> None:
    program = """
import json
from kvledger.doctor import examine
found = {result.check: result.finding for result in examine()}
assert {name for name in found if found[name].status == "problem"} == {"room", "trial"}, found
assert "8.0 MiB free in /dev/shm" in found["room"].found and "--shm-size" in found["room"].advice
assert "a ledger cannot be created" in found["trial"].found
import os
assert os.listdir("/dev/shm") == []
"""
    in_small_shm("8m", program)


def test_no_room_for_a_segment_and_no_inode_for_a_semaphore() -> None:
    program = """
import os, subprocess
from kvledger.doctor import examine
subprocess.run(["mount", "-o", "remount,nr_inodes=1", "/dev/shm"], check=True)
found = {result.check: result.finding for result in examine()}
bad = {name for name in found if found[name].status == "problem"}
assert bad == {"segment", "semaphore", "who lives", "trial"}, found
assert "No space left" in found["semaphore"].found and "inodes" in found["semaphore"].advice
assert os.listdir("/dev/shm") == []
"""
    in_small_shm("512m", program)


def test_a_default_container() -> None:
    program = """
from kvledger.doctor import examine
found = {result.check: result.finding for result in examine()}
assert found["trial"].status == "ok" and found["room"].status == "note", found
assert "by default a log may take 256.0 MiB" in found["room"].found
"""
    in_small_shm("64m", program)


def test_shm_is_not_a_tmpfs_or_not_there() -> None:
    program = """
import os, subprocess
from kvledger.doctor.shared_memory import file_system
assert file_system().status == "ok"
subprocess.run(["mount", "-t", "ramfs", "ramfs", "/dev/shm"], check=True)
assert file_system().status == "note" and "is ramfs" in file_system().found
"""
    in_small_shm("1m", program)


def test_no_shm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_memory, "SHM", tmp_path / "none")
    expect(shared_memory.file_system(), Status.PROBLEM, "does not exist")
    (tmp_path / "none").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode, effective_ids: False)  # root may write everywhere
    expect(shared_memory.file_system(), Status.PROBLEM, "cannot be written")


@pytest.mark.skipif(os.getuid() != 0, reason="takes two users")
def test_shm_of_another_user() -> None:
    program = """
import os
from kvledger.doctor.shared_memory import file_system
os.chmod("/dev/shm", 0o755)
os.seteuid(65534)
assert file_system().status == "problem" and "cannot be written by user 65534" in file_system().found
"""
    in_small_shm("1m", program)


def test_memory_behind_shm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def container(limit: int) -> None:
        for name, text in (("memory.max", f"{limit}"), ("memory.current", "0"), ("memory.stat", "inactive_file 0\n")):
            (tmp_path / name).write_text(text)

    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(shared_memory, "_CGROUP_V1_LIMIT", tmp_path / "none")
    container(shared_memory.LEAST_BYTES - 1)
    expect(shared_memory.room(), Status.PROBLEM, "32.9 MiB of memory available", "an empty ledger takes 33.0 MiB")
    container(shared_memory.LEAST_BYTES)
    monkeypatch.setattr("os.statvfs", lambda path: os.statvfs_result((4096, 4096, *[1 << 20] * 6, 0, 255)))
    expect(shared_memory.room(), Status.NOTE, "/dev/shm is larger than the memory behind it")
    (tmp_path / "none").write_text(f"{1 << 62}\n")
    monkeypatch.setattr(shared_memory, "available_memory", lambda: 8 << 30)
    expect(shared_memory.room(), Status.OK, "4.0 GiB of 4.0 GiB free", "8.0 GiB of memory")
    (tmp_path / "none").write_text(f"{64 << 20}\n")
    expect(shared_memory.room(), Status.NOTE, "a cgroup of version 1 limits it to 64.0 MiB")


def test_segments(ledger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(shared_memory.shared_segment(ledger), Status.OK, "mode 600")
    with monkeypatch.context() as patch:  # a kernel that does not know the advice
        patch.setattr(memory, "_MADV_POPULATE_WRITE", 9999)
        expect(shared_memory.shared_segment(ledger), Status.NOTE, "MADV_POPULATE_WRITE) is not supported")
    with monkeypatch.context() as patch:
        real = os.fchmod
        patch.setattr(os, "fchmod", lambda fd, mode: real(fd, 0o644))
        expect(shared_memory.shared_segment(ledger), Status.PROBLEM, "mode 644, not 600")
    with monkeypatch.context() as patch:
        patch.setattr(shared_memory, "_READ", "import sys; sys.exit('permission denied')")
        expect(shared_memory.shared_segment(ledger), Status.PROBLEM, "cannot read a segment: permission denied")
        patch.setattr(shared_memory, "_READ", "print('something else')")
        expect(shared_memory.shared_segment(ledger), Status.PROBLEM, "it reads other bytes")


# Limits


@pytest.mark.parametrize("files", [8, 40, 100])
def test_few_open_files(files: int) -> None:
    code, found = doctor(limit=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)))
    status = "note" if files == 100 else "problem"
    assert found["open files"]["status"] == status and f"{files} (ulimit -n)" in found["open files"]["found"]
    assert f"raise the hard limit, {files}" in found["open files"]["advice"]
    assert found["trial"]["status"] == ("ok" if files >= 40 else "problem"), found
    assert code == (0 if files == 100 else 2)


@pytest.mark.parametrize(("limit", "status"), [(1 << 20, "problem"), (64 << 20, "note")])
def test_small_files(limit: int, status: str) -> None:
    _, found = doctor(limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert found["file size"]["status"] == status and f"{limit >> 20}.0 MiB (ulimit -f)" in found["file size"]["found"]
    assert found["trial"]["status"] == ("ok" if status == "note" else "problem"), found


def test_small_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for room, status in ((1 << 20, Status.PROBLEM), (4 << 30, Status.NOTE)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, room=room: (used + room, used + room))
        expect(limits.address_space(), status, "(ulimit -v)")
    monkeypatch.undo()
    code, found = doctor(limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30)))
    assert code == 0 and found["address space"]["status"] == "note"
    assert found["address space"]["found"].startswith("64.0 GiB (ulimit -v), ")


# Processes


def test_workers_find_something_else(tmp_path: Path) -> None:
    """The command was started where kvledger is, and so finds it there; its workers follow PYTHONPATH."""
    package = tmp_path / "workers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "transfer.py").write_text("import no_such_engine\n")
    code, found = doctor(python=[sys.executable, "-S"], path=[tmp_path])
    bad = [name for name in found if found[name]["status"] == "problem"]
    assert code == 2 and "worker" in bad and "trial" in bad and "packages" not in bad, found
    assert "No module named 'no_such_engine'" in found["worker"]["found"]
    assert "off PYTHONPATH" in found["worker"]["advice"]
    (package / "transfer.py").write_text("")
    code, found = doctor(python=[sys.executable, "-S"], path=[tmp_path])
    assert code == 2 and f"a worker imports kvledger from {tmp_path}" in found["worker"]["found"]


def test_workers_find_what_this_process_alone_was_told_of(tmp_path: Path) -> None:
    install(tmp_path)
    code, found = doctor(python=[sys.executable, "-S"], path=[], cwd=tmp_path)
    assert code == 0 and found["worker"]["status"] == found["segment"]["status"] == "ok", found
    assert f"kvledger's own, in {tmp_path.resolve()}" in found["packages"]["found"]


def test_what_lies_in_the_working_directory_is_no_matter(tmp_path: Path) -> None:
    for name in ("workers", "ipc", "statemachine"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    code, found = doctor(cwd=tmp_path)
    assert code == 0 and found["packages"]["status"] == "note", "for a script that lies there it would matter"
    assert all(found[name]["status"] == "ok" for name in NEEDED if name != "packages"), found


def test_an_interpreter_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, ledger: str) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    expect(processes.worker(), Status.PROBLEM, "/nowhere/python cannot be started")
    expect(trial(ledger), Status.PROBLEM, "a ledger cannot be created", "/nowhere/python")


def test_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        expect(processes.cores(), Status.NOTE, "1 core: ")
    finally:
        os.sched_setaffinity(0, before)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(processes, "_CPU_LIMIT", tmp_path / "cpu.max")
    expect(processes.cores(), Status.OK, "8 cores, enough for 7 ranks")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    expect(processes.cores(), Status.OK, "8 cores, enough for 7 ranks")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    expect(processes.cores(), Status.NOTE, "1.5 cores (cpu.max of the container)")


def only(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at these ledgers alone: others of this machine would be named first, or come and go meanwhile."""
    monkeypatch.setattr(processes, "ledgers", lambda: [each for each in ledgers() if each.name.startswith(prefix)])


def test_ledgers_left_behind(ledger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(ledger, monkeypatch)
    assert processes.left_behind().status == Status.OK
    subprocess.run([sys.executable, "-c", DEAD, ledger], timeout=PATIENCE_S)
    finding = processes.left_behind()
    expect(finding, Status.NOTE, "dead (", ledger)
    assert "kvledger segments --remove-dead" in finding.advice
    remove_objects(ledger)
    assert processes.left_behind().status == Status.OK
    for number in range(4):
        subprocess.run([sys.executable, "-c", DEAD, f"{ledger}-{number}"], timeout=PATIENCE_S)
    try:
        expect(processes.left_behind(), Status.NOTE, "4 dead (", f"{ledger}-0, {ledger}-1, {ledger}-2 and 1 more")
    finally:
        for number in range(4):
            remove_objects(f"{ledger}-{number}")


@pytest.mark.skipif(os.getuid() != 0, reason="takes two users")
def test_ledgers_of_other_users(ledger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(ledger, monkeypatch)
    subprocess.run([sys.executable, "-c", DEAD, ledger], timeout=PATIENCE_S)
    files = [SHM / name for name in os.listdir(SHM) if name.startswith(f"{ledger}.")]
    for file in files:
        os.chown(file, 65534, 65534)
    try:
        expect(processes.left_behind(), Status.NOTE, "of other users (", ledger)
    finally:
        for file in files:  # what another user owns is not removed with the rest
            os.chown(file, os.geteuid(), -1)


# Optional parts


def test_the_extras_are_those_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*optional.EXTRAS} == {*project["optional-dependencies"]} - {"paddle-gpu", "bench", "test"}
    expect(optional.extras(), Status(optional.extras().status), "export", "metrics")
    monkeypatch.setattr(optional, "EXTRAS", {"export": ("json",), "otel": ("no_such.module",)})
    expect(optional.extras(), Status.NOTE, "installed: export; not: otel")
    monkeypatch.setattr(optional, "EXTRAS", {"export": ("json",)})
    expect(optional.extras(), Status.OK, "installed: export")


def test_gpus(libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(LIBRARY, "/nowhere/libcuda.so")
    expect(optional.gpu(), Status.NOTE, "none to be used: loading the CUDA driver", "/nowhere/libcuda.so")
    use(libraries["batch"], tmp_path, monkeypatch)
    standin = Standin(tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    expect(optional.gpu(), Status.OK, "device")
    standin.fail("cuInit 100")
    expect(optional.gpu(), Status.NOTE, "none to be used: cuInit: ")
    standin.fail()
    use(libraries["loop"], tmp_path, monkeypatch)
    expect(optional.gpu(), Status.NOTE, "before CUDA 12.8")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20,) * 2)
    expect(optional.gpu(), Status.NOTE, "8.0 MiB may be locked")


def test_drivers_of_sick_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "_TIMEOUT_S", 0.5)
    monkeypatch.setattr(optional, "_ASK", "import time; time.sleep(100)")
    expect(optional.gpu(), Status.PROBLEM, "does not answer within 0.5 s")
    monkeypatch.setattr(optional, "_TIMEOUT_S", 60)
    monkeypatch.setattr(optional, "_ASK", "import os; os.kill(os.getpid(), 11)")
    expect(optional.gpu(), Status.PROBLEM, "by signal 11")
    monkeypatch.setattr(optional, "_ASK", "print(0, 1)")
    expect(optional.gpu(), Status.NOTE, "a driver, and no device")


# The trial, and its end


def test_bytes_that_do_not_come_back(ledger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody writes into the host pool between the copy out and the copy in."""
    expect(trial(ledger), Status.OK)
    real = vars(NumpyPools)["device"].fget
    looks = 0

    def planted(self: NumpyPools) -> Any:
        """The first look writes blocks, the second zeros over them: then they are on the host alone."""
        nonlocal looks
        looks += 1
        if looks == 2:
            self.host[:] ^= 1
        return real(self)

    monkeypatch.setattr(NumpyPools, "device", property(planted))
    expect(trial(ledger), Status.PROBLEM, "not swapped out and in: they came back with other bytes")
    assert not [name for name in os.listdir(SHM) if name.startswith(ledger)]


HELD = """
import sys
from kvledger.cli import main
from kvledger.doctor import trial
swap = trial._swap
def held(manager):
    print("swapping", file=sys.stderr, flush=True)
    sys.stdin.readline()
    return swap(manager)
trial._swap = held
sys.argv = ["kvledger", "doctor"]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HELD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None and process.stderr.readline() == "swapping\n"
        assert left_by(process.pid)
        os.killpg(process.pid, number)  # as a terminal does: its worker hears it too
        out, errors = process.communicate("\n", timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130 and not out and "Traceback" not in errors
    assert not left_by(process.pid)
