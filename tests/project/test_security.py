"""Who may read and write what, that nothing stored is ever run, and that tenants do not see each other."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import Control, InvalidName, KvlogWriter, LedgerError, LogReader, LogWriter, NotPrivate, snapshots
from ipc.names import SHM
from ipc.ownership import objects_of, remove_objects, segments_of
from ipc.segment import MappedSegment
from ipc.signals import Signals
from kvledger import CacheConfig, CacheManager, HostPolicy, namespace_key
from kvledger.debugger import open_source
from kvledger.handoff.receiver import Receiver
from kvledger.handoff.sender import Sender
from kvledger.recordings.recording import Recording
from kvledger.run.run import Run, RunOptions
from kvledger.run.sample import generate
from tests.waiting import PATIENCE_S
from workers.followers import auditor
from workers.followers.auditor import Auditor
from workers.pools.backends import create_pools, open_pools

ROOT = Path(__file__).parents[2]
NOBODY = 65534


@pytest.fixture
def name() -> Iterator[str]:
    ledger = f"private-{os.getpid()}"
    yield ledger
    remove_objects(ledger)


@pytest.fixture(params=[0o000, 0o022, 0o277, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_everything_is_0600_whatever_the_umask(name: str, umask: None, tmp_path: Path) -> None:
    config = CacheConfig(
        block_size=4, device_blocks=8, host_blocks=8, host_policy=HostPolicy.EXCLUSIVE, ranks=1, segment_bytes=64 << 10
    )
    with CacheManager.create(name, config) as manager:
        one = Auditor(name)
        manager.admit("a", np.arange(16, dtype=np.int32))
        one.step()
        snapshots.write(name, 7, b"state")
        objects = [own.file for own in objects_of(name)]
        kinds = {"control", "bell", "pool", "rank0", "auditor", "snapshot", "1"}
        assert {entry.removeprefix("sem.").removeprefix(f"{name}.").split(".")[0] for entry in objects} == kinds
        assert {entry: stat.S_IMODE((SHM / entry).stat().st_mode) for entry in objects} == dict.fromkeys(objects, 0o600)
        one.close()
    path = tmp_path / "x.kvlog"
    Run(generate(5), RunOptions(device_blocks=400, data=False, record=path)).execute(name)
    with Recording(path):
        pass
    assert [stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()] == [0o600, 0o600]


def objects(name: str) -> dict[str, tuple[str, Callable[[], object]]]:
    """Every kind of object: its file, and how it is attached."""
    config = CacheConfig(device_blocks=4, ranks=1)
    return {
        "control": (f"{name}.control", lambda: Control.open(name)),
        "segment": (f"{name}.1.0", lambda: MappedSegment(name, 1, 0)),
        "reader": (f"{name}.1.0", lambda: LogReader(name)),
        "signals": (f"{name}.auditor", lambda: Signals(f"/{name}.auditor")),
        "pool": (f"{name}.pool.device.0", lambda: open_pools(name, 0, config.layout)),
        "snapshot": (f"{name}.snapshot.7", lambda: snapshots.read(name, 7)),
    }


@pytest.mark.parametrize("what", ["control", "segment", "reader", "signals", "pool", "snapshot"])
@pytest.mark.parametrize("change", ["group", "other", "owner"])
def test_nobody_attaches_what_others_can_touch(name: str, what: str, change: str) -> None:
    if change == "owner" and os.geteuid() != 0:
        pytest.skip("only root can give an object away")
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=64 << 10)
    Signals(f"/{name}.auditor", create=True).close()
    snapshots.write(name, 7, b"state")
    create_pools(name, CacheConfig(device_blocks=4, ranks=1).layout)
    file, attach = objects(name)[what]
    attach()
    if change == "owner":
        os.chown(SHM / file, NOBODY, -1)
    else:
        (SHM / file).chmod(0o640 if change == "group" else 0o602)
    with pytest.raises(NotPrivate, match="run this as its owner"):
        attach()
    os.chown(SHM / file, os.geteuid(), -1)
    writer.close(unlink=True)


_OTHER_USER = """
import os, sys
from ipc import LedgerError, LogReader
from kvledger import CacheConfig, CacheManager
os.setuid(65534)
for call in (lambda: LogReader(sys.argv[1]), lambda: CacheManager.create(sys.argv[1], CacheConfig(device_blocks=4))):
    try:
        call()
    except LedgerError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_neither_read_nor_take_over(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=64 << 10)
    done = subprocess.run([sys.executable, "-c", _OTHER_USER, name], capture_output=True, text=True, cwd=ROOT)
    first, second = done.stdout.splitlines()
    assert first.startswith("NotPrivate") and "run this as that user" in first
    assert second.startswith("LedgerExists") and "choose another name" in second
    writer.close(unlink=True)


def test_a_name_that_somebody_took_before(name: str) -> None:
    """Squatting on the next segment's name stops neither the writer nor a reader, and nobody else touches the file."""
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=64 << 10)
    writer._helper.submit(int).result()
    theirs = SHM / f"{name}.1.2"
    theirs.write_bytes(b"mine")
    reader = LogReader(name)
    for number in range(20):
        writer.append([(1, number, b"", bytes(15_000))])
    late = LogReader(name)
    for one in (reader, late):
        subjects: list[int] = []
        while records := one.poll():
            subjects += [record.subject for record in records]
        assert subjects == list(range(20)) and len(segments_of(name)) > 4
        one.close()
    writer.close(unlink=True)
    assert theirs.read_bytes() == b"mine"
    theirs.unlink()
    assert not objects_of(name)


SQUATTERS = """
import os, sys
os.setgid(65534); os.setuid(65534)
for file in sys.argv[1:]:
    os.close(os.open(f"/dev/shm/{file}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
"""
TO_COME = (
    *("1.1", "1.9", "2.0", "2.1", "2.9", "9.0"),
    *("snapshot.5", "snapshot.18446744073709551615", "auditor", "tickets"),
    *("pool.device.0", "pool.host.0", "rank0.1.control", "rank0.1.signals", "rank0.1.1.0"),
    *("rank0.2.control", "rank0.2.signals", "rank0.99.signals", "pushes.control", "pushes.1.0", "pushes.progress.0"),
    *("pushes.rank0.1.signals", "pushes.rank0.1.control", "something"),
)
"""Names at which a ledger has objects, or will have some."""


@pytest.fixture
def squatted(name: str) -> Iterator[list[str]]:
    """Files of another user at all names that a ledger has objects at, semaphores included."""
    bells = [f"sem.{name}.{part}bell.{line}" for part in ("", "rank0.1.", "pushes.") for line in range(3)]
    files = [*(f"{name}.{each}" for each in TO_COME), *bells]
    try:
        subprocess.run([sys.executable, "-c", SQUATTERS, *files], check=True, timeout=PATIENCE_S)
        yield files
    finally:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                (SHM / file).unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_files_of_another_user_at_all_our_names_stop_nobody(name: str, squatted: list[str]) -> None:
    """Engine, worker, auditor, sender, receiver, readers and a successor: all go on as if the names were free."""
    config = CacheConfig(
        block_size=4, device_blocks=8, host_blocks=8, host_policy=HostPolicy.EXCLUSIVE, ranks=1, segment_bytes=64 << 10
    )

    def serve(manager: CacheManager, count: int) -> None:
        for number in range(count):
            key = f"{number}"
            manager.admit(key, np.arange(number, number + 16, dtype=np.int32))
            manager.wait(key)
            manager.cache(key)
            manager.release(key)

    manager = CacheManager.create(name, config)
    try:
        receiver, sender = Receiver(manager), Sender(manager)
        one = Auditor(name, snapshot_bytes=1)
        serve(manager, 200)
        while one.step():
            pass
        found = auditor.progress(name)
        assert one.verdict is None and found is not None and found.alive and found.snapshot > 0
        with pytest.raises(auditor.AuditorRunning):
            Auditor(name)
        one.close()
        with open_source(name) as source:
            assert source.last == manager.next_sequence - 1 and source.at(source.last) is not None
        sender.close()
        receiver.close()
        before = manager.next_sequence - 1
    finally:
        manager.close(keep=True)
    with CacheManager.open(name) as successor:
        assert successor.next_sequence > before > 200 and not successor.state.requests
        serve(successor, 20)
    assert not objects_of(name)
    assert all((SHM / file).stat().st_uid == NOBODY for file in squatted), "and they are still there"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_file_of_another_user_stops_no_recovery_of_a_killed_engine(name: str) -> None:
    code = (
        "import os, sys\nfrom kvledger import CacheConfig, CacheManager\n"
        "manager = CacheManager.create(sys.argv[1], CacheConfig(device_blocks=50, block_size=4))\n"
        "manager.admit('a', [1, 2, 3, 4, 5])\nmanager.cache('a')\nmanager.release('a')\nos.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, name], timeout=PATIENCE_S)
    theirs = [f"{name}.9.0", f"{name}.snapshot.3", f"{name}.tickets", f"{name}.pushes.control", f"{name}.auditor"]
    subprocess.run([sys.executable, "-c", SQUATTERS, *theirs], check=True, timeout=PATIENCE_S)
    try:
        for start in (1, 2):
            LogReader(name, from_sequence=start).close()
        assert auditor.progress(name) is None
        with CacheManager.open(name) as manager:
            assert manager.peek([1, 2, 3, 4, 5])[0] == 1
        assert not objects_of(name)
    finally:
        for file in theirs:
            (SHM / file).unlink()


@pytest.mark.parametrize("bad", ["a.b", "a.pushes", "a.auditor", "a.rank0.1", "a.", ".a", "sem", "a~1", ""])
def test_names_that_could_be_anothers_objects_are_refused(bad: str) -> None:
    for call in (lambda: CacheManager.create(bad, CacheConfig(device_blocks=4)), lambda: CacheManager.open(bad)):
        with pytest.raises(InvalidName, match=r"use up to 64 letters|choose another"):
            call()


def test_closing_a_ledger_removes_nothing_of_another(name: str) -> None:
    """Not even where it has the same name: an earlier one, whose control segment somebody removed."""
    with pytest.raises(InvalidName, match=f"use '{name}-b'"):
        CacheManager.create(f"{name}.b", CacheConfig(device_blocks=4))
    first = LogWriter.create(name, schema_hash=1, segment_bytes=64 << 10)
    first.append([(1, 1, b"", b"")])
    os.rename(SHM / f"{name}.control", SHM / f"{name}-away")
    with CacheManager.create(name, CacheConfig(device_blocks=4)) as manager:
        manager.admit("a", [1, 2, 3])
        with open_source(name) as source:
            assert source.last == manager.next_sequence - 1
    assert (SHM / f"{name}.1.0").exists()
    os.rename(SHM / f"{name}-away", SHM / f"{name}.control")
    reader = LogReader(name)
    assert [record.subject for record in reader.poll()] == [1]
    reader.close()
    first.close(unlink=True)
    assert not objects_of(name)


def test_an_object_has_its_name_when_it_is_complete(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it makes one leaves nothing, and nobody ever meets half of one."""
    link = os.link

    def named(*arguments: object, **options: object) -> None:
        seen.append(objects_of(name))
        link(*arguments, **options)  # type: ignore[arg-type]
        assert Control.open(name).schema_hash == 1
        assert all(snapshots.read(name, sequence) == b"state" for sequence in snapshots.sequences(name))

    seen: list[object] = []
    monkeypatch.setattr(os, "link", named)
    control = Control.create(name, 1)
    assert seen == [[]] and Control.open(name).writer_alive()
    snapshots.write(name, 5, b"state")
    assert snapshots.sequences(name) == [5]
    remove_objects(name, control.identity)
    control.close()


def test_without_files_that_have_no_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel or file system that knows no O_TMPFILE: an object is made under another name."""
    real = os.open

    def older(path: object, flags: int, *rest: int, **options: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", older)
    with CacheManager.create(name, CacheConfig(device_blocks=4, ranks=1)) as manager:
        manager.admit("a", [1, 2, 3])
        assert not [own for own in objects_of(name) if "begun" in own.file]
    assert not [file for file in os.listdir(SHM) if file.startswith(name)]


def test_a_recording_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "x.kvlog").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LedgerError, match="exists"):
        KvlogWriter(tmp_path / "x.kvlog", schema_hash=1)
    assert not (tmp_path / "elsewhere").exists()


FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "multiprocessing"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
PREDICATES = "kvledger/debugger/verify/predicates.py"
ALLOWED = {("statemachine/records/codec.py", "exec"), (PREDICATES, "compile"), (PREDICATES, "eval")}
"""The codec compiles text that it makes from its own event table when it is imported; nothing stored enters. A
predicate of the debugger is code that its user types."""


def findings(path: Path) -> set[tuple[str, str]]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0]} & FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            found |= {ast.unparse(node.func)} & FORBIDDEN_CALLS
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle") and not _is_false(keyword.value):
                    found.add(f"{keyword.arg}=")
    return {(str(path.relative_to(ROOT)), what) for what in found}


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_nothing_stored_is_ever_run() -> None:
    files = [
        path for package in ("statemachine", "ipc", "workers", "kvledger") for path in (ROOT / package).rglob("*.py")
    ]
    assert len(files) > 40
    found = set().union(*map(findings, files))
    assert found == ALLOWED


def test_the_search_finds_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\nfrom marshal import loads\nos.system('x')\neval('1')\nrun('x', shell=True)\n")
    assert {what for _, what in findings(bad)} == {"pickle", "marshal", "os.system", "eval", "shell="}


TENANTS = st.sampled_from(["", "a", "b", "ab", "\0", "a\0"])
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=24)


@given(st.lists(st.tuples(TENANTS, TENANTS, TENANTS, PROMPTS), min_size=1, max_size=25), st.booleans())
def test_nothing_of_one_namespace_is_matched_in_another(
    requests: list[tuple[str, str, str, list[int]]], host: bool
) -> None:
    """A request never hits more than what was cached with its own salt, adapter and weights, and never its blocks."""
    config = CacheConfig(
        block_size=2,
        device_blocks=16,
        host_blocks=8 if host else 0,
        host_policy=HostPolicy.EXCLUSIVE if host else HostPolicy.OFF,
        segment_bytes=64 << 10,
    )
    seen: dict[tuple[str, str, str], list[list[int]]] = {}
    with CacheManager.create(f"tenants-{os.getpid()}", config) as manager:
        for number, (salt, lora, weights, prompt) in enumerate(requests):
            space = namespace_key(salt=salt, lora=lora, weights=weights)
            own = seen.setdefault((salt, lora, weights), [])
            known = max((_common(prompt, other) for other in own), default=0) // 2
            admission = manager.admit(str(number), np.array(prompt, np.int32), namespace=space)
            assert admission.device_blocks + admission.host_blocks <= known
            request = manager.state.requests[manager.state.numbers[str(number)]]
            path = manager.state.path(request.leaf)
            assert not path or manager.state.roots[space] is path[0].parent
            manager.cache(str(number))
            manager.release(str(number))
            own.append(prompt)


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


@given(TENANTS, TENANTS, TENANTS, TENANTS, TENANTS, TENANTS)
def test_different_tenants_have_different_namespaces(a: str, b: str, c: str, d: str, e: str, f: str) -> None:
    same = namespace_key(lora=a, salt=b, weights=c) == namespace_key(lora=d, salt=e, weights=f)
    assert same == ((a, b, c) == (d, e, f))


def test_no_process_runs_what_lies_in_the_current_directory(tmp_path: Path) -> None:
    """Engine, workers, auditor and a killed engine's successor, started beside modules of the same names."""
    ran = tmp_path / "ran"
    for name in ("workers", "ipc", "statemachine", "kvledger", "numpy", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write({name!r})\nraise SystemExit(3)\n")
    name = f"beside-{os.getpid()}"
    options = ["--requests", "40", "--crash", "engine@150", "--crash", "follower@60", "--name", name, "--json"]
    command = [sys.executable, "-P", "-m", "kvledger.cli", "run", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert not ran.exists(), ran.read_text()


def test_every_process_is_started_by_the_same_rule() -> None:
    """``workers.processes.programs`` alone says how this interpreter is run."""
    found = [
        str(path.relative_to(ROOT))
        for package in ("statemachine", "ipc", "workers", "kvledger")
        for path in (ROOT / package).rglob("*.py")
        if "sys.executable" in path.read_text()
    ]
    assert found == ["workers/processes/programs.py"]
