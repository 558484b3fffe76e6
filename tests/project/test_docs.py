"""The documents agree with the code."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import kvledger
from kvledger.adapters.fastdeploy import SIGNALS, PrefixCacheManager
from kvledger.cli import app
from kvledger.run import traces
from kvledger.telemetry.table import BY_NAME
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]


def test_what_is_generated_is_up_to_date() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    for path, text in generator["pages"]():
        assert path.read_text() == text, f"{path.name}: run python docs/generate.py"


def test_readme_example_runs(capsys: object) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(code[1], {})


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_page_about_traces_is_true(tmp_path: Path) -> None:
    """Its examples can be read, and what is malformed gets the answers that it shows."""
    page = (ROOT / "docs" / "traces.md").read_text()
    path = tmp_path / "trace.jsonl"
    examples = re.findall(r"```jsonl\n(.*?)```", page, re.DOTALL)
    loaded = []
    for example in examples:
        path.write_text(example)
        loaded.append(traces.load(path))
        assert len(loaded[-1].requests) == example.count("\n")
    assert [trace.block_size for trace in loaded] == [None, 4]
    used = {field for example in examples for line in example.splitlines() for field in json.loads(line)}
    told = set(
        re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", page.partition("## What is wrong")[0], re.M)))
    )
    assert used == told
    rows = re.findall(r"^\| (.*?) ?\| `(.*)` \|$", page.partition("## What is wrong")[2], re.M)
    assert len(rows) > 10
    for lines, answer in rows:
        path.write_text("\n".join(re.findall(r"`(.*?)`", lines)))
        with pytest.raises(traces.TraceError) as error:
            traces.load(path)
        assert re.match(rf"{re.escape(str(path))}[,:] {re.escape(answer)}", str(error.value)), str(error.value)


@pytest.mark.parametrize(("page", "least"), [("integrating.md", 8), ("fastdeploy.md", 1)])
def test_the_steps_of_a_page_run_in_order(page: str, least: int) -> None:
    text = (ROOT / "docs" / page).read_text()
    steps = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(steps) >= least
    space: dict[str, object] = {}
    for number, step in enumerate(steps, 1):
        exec(compile(step, f"{page}, snippet {number}", "exec"), space)


ANSWERS = {"admission": kvledger.Admission, "grown": kvledger.Growth, "refusal": kvledger.OutOfBlocks}


def renamed() -> dict[str, list[list[str]]]:
    """By engine: their call, ours, and what is different."""
    parts = re.split(r"\n## ", (ROOT / "docs" / "coming-from.md").read_text())[1:]
    lines = {part.partition("\n")[0]: re.findall(r"^\| (.*)\|$", part, re.M) for part in parts}
    return {engine: [[*map(str.strip, line.split("|"))] for line in rows[1:]] for engine, rows in lines.items()}


def assert_ours(code: str) -> None:
    """A call, an argument, an attribute or a command of kvledger exists, with the arguments that are named."""
    head, _, inside = code.partition("(")
    if code.startswith("kvledger "):
        assert code.split()[1] in vars(typer.main.get_command(app))["commands"], code
        return
    if head.endswith("="):
        assert head[:-1] in inspect.signature(kvledger.CacheManager.admit).parameters, code
        return
    owner, _, name = head.rpartition(".")
    if owner:
        target = ANSWERS.get(owner) or getattr(kvledger, owner)
        assert hasattr(target, name) or re.search(rf"\bself\.{name}\b|^    {name}:", inspect.getsource(target), re.M), (
            code
        )
        target = getattr(target, name, None)
    else:
        target = getattr(kvledger.CacheManager, head, None) or getattr(kvledger, head)
    if inside:
        assert set(re.findall(r"(\w+)=", inside)) <= set(inspect.signature(target).parameters), code
    for enum, member in re.findall(r"\b([A-Z]\w+)\.([A-Z_]+)", inside):
        assert hasattr(getattr(kvledger, enum), member), code


def test_whoever_comes_from_another_engine_is_told_of_calls_that_exist() -> None:
    tables = renamed()
    assert tables.keys() == {"vLLM", "SGLang", "FastDeploy"}
    for rows in tables.values():
        assert len(rows) > 10 and all(len(row) == 3 for row in rows)
        for _, ours, _ in rows:
            for code in re.findall(r"`([^`]+)`", ours):
                assert_ours(code)
    for theirs, _, _ in tables["FastDeploy"]:
        for code in re.findall(r"`(\w+)", theirs):
            assert hasattr(PrefixCacheManager, code), code


@pytest.mark.parametrize(("engine", "package"), [("vLLM", "vllm"), ("SGLang", "sglang")])
def test_the_calls_of_other_engines_are_theirs(engine: str, package: str) -> None:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed: `make bench` has an environment with it")
    text = "".join(path.read_text() for path in Path(found.origin).parent.rglob("*.py"))
    for theirs, _, _ in renamed()[engine]:
        for code in re.findall(r"`([^`]+)`", theirs):
            for name in re.findall(r"\b[A-Za-z]\w+_\w+|\b[A-Z]\w+[a-z][A-Z]\w+", code):
                assert re.search(rf"\b{name}\b", text), name


def test_the_snippets_have_the_types_that_a_user_checks(tmp_path: Path) -> None:
    """With the settings of the project, which are those of ``mypy --strict``."""
    for page in ("README.md", "docs/integrating.md", "docs/fastdeploy.md"):
        steps = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        (tmp_path / f"snippets_of_{Path(page).stem.lower()}.py").write_text("\n".join(steps))
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from kvledger import CacheManager\nCacheManager.open(1).known('r').upper()\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        *map(str, tmp_path.iterdir()),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    told = [
        line.partition(": error: ")[2].rpartition("  ")[0] for line in done.stdout.splitlines() if ": error: " in line
    ]
    assert sorted(told) == [
        '"int" has no attribute "upper"',
        'Argument 1 to "open" of "CacheManager" has incompatible type "int"; expected "str"',
    ], done.stdout + done.stderr


def test_type_checkers_see_what_is_installed_from_here() -> None:
    """An import hook, which is what an editable installation is by itself, is nothing to them."""
    makefile = (ROOT / "Makefile").read_text()
    assert "EDITABLE = --config-settings editable_mode=compat --editable" in makefile
    assert makefile.count("--editable") == 1 and makefile.count("$(EDITABLE)") == 4
    for package in ("kvledger", "ipc", "statemachine", "workers"):
        assert (ROOT / package / "py.typed").exists()


def test_the_table_of_signals_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "fastdeploy.md").read_text().partition("## Signals")[2]
    rows = [tuple(line.strip("| ").split(" | ")) for line in page.splitlines() if line.startswith("| `")]
    assert rows == [(f"`{name}`", *signal) for name, signal in SIGNALS.items()]


def test_the_reference_is_up_to_date() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    for path, text in generator["pages"]():
        assert path.read_text() == text, f"{path.name}: run python docs/generate.py"


def test_every_public_name_is_explained() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for entry in re.split(r"\n### ", page)[1:]:
        name, _, text = entry.partition("\n")
        assert re.sub(r"```.*?```", "", text.split("\n#### ")[0], flags=re.DOTALL).strip(), f"{name} has no docstring"
        for member in entry.split("\n#### ")[1:]:
            name, _, text = member.partition("\n")
            assert re.sub(r"```.*?```", "", text, flags=re.DOTALL).strip(), f"{name} has no docstring"
    anchors = {line[4:].lower() for line in page.splitlines() if line.startswith("### ")}
    for link in re.findall(r"\]\(#([^)]+)\)", page):
        assert re.sub(r"-1$", "", link) in anchors, link


def metrics_in(text: str) -> dict[str, set[str]]:
    """Metrics that a query or a page names, and the labels that it compares."""
    found: dict[str, set[str]] = {}
    for name, selector in re.findall(r"\b(kvledger_[a-z_]+)(?:\{([^}]*)\})?", text):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        found.setdefault(base if base in BY_NAME else name, set()).update(re.findall(r"(\w+)\s*[!=]", selector))
    return found


def assert_known(text: str, where: str) -> None:
    for name, labels in metrics_in(text).items():
        assert name in BY_NAME, f"{where}: there is no metric {name}"
        assert labels <= {"ledger", "le", *BY_NAME[name].labels}, f"{where}: {name} has no labels {labels}"


def test_the_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana" / "kvledger.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    shown: set[str] = set()
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert_known(target["expr"], panel["title"])
            shown |= set(metrics_in(target["expr"]))
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert any(label in BY_NAME[name].labels for name in metrics_in(target["expr"])), panel["title"]
    for variable in dashboard["templating"]["list"]:
        assert_known(variable.get("definition", ""), variable["name"])
    hidden = {"kvledger_exporter_sequence", "kvledger_skipped_events_total", "kvledger_cleared_caches_total"}
    hidden |= {"kvledger_pool_capacity_blocks", "kvledger_allocated_blocks_total", "kvledger_swapped_blocks_total"}
    hidden |= {"kvledger_lost_tiers_total", "kvledger_shared_memory_size_bytes", "kvledger_auditor_up"}
    assert set(BY_NAME) - shown == hidden, "a metric is neither on the dashboard nor left out on purpose"


def test_alerts_name_metrics_and_sections_that_exist() -> None:
    rules = yaml.safe_load((ROOT / "docs" / "grafana" / "alerts.yml").read_text())["groups"][0]["rules"]
    page = (ROOT / "docs" / "operations.md").read_text()
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", page, re.M)
    }
    for rule in rules:
        assert_known(rule["expr"], rule["alert"])
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert path == "docs/operations.md" and anchor in anchors, rule["alert"]
        assert rule["alert"] in page, f"{rule['alert']} is not in the runbook"
    assert set(re.findall(r"\bKvledger\w+", page)) == {rule["alert"] for rule in rules}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Debian's package prometheus")
def test_alerts_fire_when_they_should() -> None:
    rules = ["check", "rules", "docs/grafana/alerts.yml"], ["test", "rules", "tests/telemetry/alerts_test.yml"]
    for arguments in rules:
        done = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Debian's package prometheus")
def test_the_queries_of_the_dashboard_are_promql(tmp_path: Path) -> None:
    """Each as a rule of its own, after Grafana has put its variables in."""
    dashboard = json.loads((ROOT / "docs" / "grafana" / "kvledger.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(queries) > 40
    put_in = [query.replace("$__rate_interval", "5m").replace("$ledger", "engine-1") for query in queries]
    assert not any("$" in query for query in put_in)
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(put_in)]
    path = tmp_path / "queries.yml"
    for broken in ("", "sum by (tier) rate(x[5m])"):
        more = [{"record": "broken", "expr": broken}] if broken else []
        path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules + more}]}))
        done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, timeout=PATIENCE_S)
        assert (done.returncode != 0) == bool(broken), done.stdout + done.stderr


def test_the_runbook_names_metrics_and_commands_that_exist() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert_known(page, "operations.md")
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    for command in re.findall(r"`kvledger ([^`]+)`", page):
        name, *words = command.split()
        assert name in commands, f"there is no kvledger {name}"
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, command


def test_the_comparison_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "comparison.md").read_text()
    rows = [line for line in page.partition("## Costs")[0].splitlines() if line.startswith("| ")][1:]
    for row in rows:
        path, _, name = row.split(" | ")[2].strip("`").partition("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"


def test_every_test_that_a_page_names_exists() -> None:
    known: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        place = path.relative_to(ROOT / "tests").as_posix()
        known.add(place)
        known.update(f"{place}::{name}" for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    for page in ("guarantees.md", "testing.md"):
        named = set(re.findall(r"`(\w+/test_\w+\.py(?:::test_\w+)?)", (ROOT / "docs" / page).read_text()))
        assert len(named) > 10 and named <= known, f"{page}: {sorted(named - known)}"


def test_the_evidence_names_commands_and_tests_that_exist() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", page)) <= targets
    for path in re.findall(r"-m pytest ([\w/.]+)", page):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`(\w+/test_\w+\.py)`", page):
        assert (ROOT / "tests" / path).exists(), path
    for module in re.findall(r"-m (examples\.\w+)", page):
        assert (ROOT / module.replace(".", "/") / "__main__.py").exists(), module


def test_an_index_shows_the_readme_without_links_into_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    given: dict[str, str] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: given.update(settings))
    monkeypatch.delenv("KVLEDGER_NATIVE", raising=False)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    page = (ROOT / "README.md").read_text()
    assert "](docs/" in page and "docs/integrating.md (step by step)" in given["long_description"]
    assert not re.findall(r"\]\((?!https?://)", given["long_description"])
    assert given["long_description_content_type"] == "text/markdown"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["readme"] and {"authors", "keywords", "classifiers", "license"} <= project.keys()


def test_the_version_is_the_one_of_the_distribution() -> None:
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert kvledger.__version__ == written
