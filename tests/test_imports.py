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
    assert not roots & {"pickle", "_pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal", "jsonpickle"}
    assert not list(unpickling(tree))


UNPICKLING = {"torch.load", "torch.save", "torch.package", "trust_remote_code", "weights_only", "allow_pickle"}


def unpickling(tree: ast.AST) -> Iterator[str]:
    """What in a module reads or writes a pickle, or runs code that comes with data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in UNPICKLING or node.attr in ("read_pickle", "to_pickle", "unsafe_load", "UnsafeLoader"):
                yield name
            if name in ("yaml.load", "yaml.full_load", "yaml.Loader", "yaml.FullLoader"):
                yield name
        elif isinstance(node, ast.keyword) and node.arg in UNPICKLING:
            if not (isinstance(node.value, ast.Constant) and node.value.value is (node.arg == "weights_only")):
                yield node.arg
        elif isinstance(node, ast.keyword) and node.arg in ("result_serializer", "serializer"):
            if not (isinstance(node.value, ast.Constant) and node.value.value == "json"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "PickleSerializer"):
            yield node.id


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "x = torch.load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=maybe)",
        "torch.hub.load(a, weights_only=False)",
        "from_pretrained(a, trust_remote_code=True)",
        "pd.read_pickle(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "task(result_serializer='pickle')",
        "flow(result_serializer=PickleSerializer())",
        "eval(text)",
    ],
)
def test_code_that_reads_a_pickle_is_found(code: str) -> None:
    assert list(unpickling(ast.parse(code)))
    allowed = "np.load(p, allow_pickle=False); f(trust_remote_code=False); task(result_serializer='json'); model.eval()"
    assert not list(unpickling(ast.parse(allowed)))


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


def test_a_run_s_own_process_needs_no_torch() -> None:
    """Its steps' children have it; importing it takes seconds."""
    code = "import sys, flows.pipeline, lors.diagnosis, lors.diagnostics_page; "
    code += "sys.exit(', '.join({'torch', 'transformers'} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
