"""The house: flows -> tasks -> lors, Prefect kept out of lors and of the quick commands, no pickles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"lors": {"lors"}, "tasks": {"lors", "tasks"}, "flows": {"lors", "tasks", "flows"}}
MODULES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide their direction"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_in_the_one_direction(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    names = {name.partition(".")[0] for name in imported(ast.parse(path.read_text("utf-8")))}
    assert names & MAY_IMPORT.keys() <= MAY_IMPORT[package]
    if package == "lors":
        assert "prefect" not in names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_reads_and_writes_no_pickle(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    roots = {name.partition(".")[0] for name in imported(tree)}
    assert not roots & {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {call for call in calls if call in ("torch.load", "torch.save") or call.endswith("read_pickle")}


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        (["plan", "experiment.yaml"], ["prefect", "torch", "transformers"]),
        (["merge", "--list"], ["prefect", "transformers"]),
        (["doctor"], ["prefect"]),
        (["--help"], ["prefect", "torch", "numpy", "pydantic"]),
    ],
    ids=["plan", "merge", "doctor", "help"],
)
def test_a_quick_command_imports_little(command: list[str], absent: list[str], tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(
        "{base: starter, languages: [es], corpora: {source: synthetic}, output: out, store: store}"
    )
    code = "import sys; from flows.cli import main\ntry: main(sys.argv[2:])\nexcept SystemExit: pass\n"
    code += "found = sorted(set(sys.argv[1].split(',')) & sys.modules.keys()); sys.exit(', '.join(found) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code, ",".join(absent), *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
