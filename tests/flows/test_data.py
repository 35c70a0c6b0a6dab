"""`lors data check` as a newcomer and a script meet it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flows_helpers import tiny, written

from flows.cli import main
from flows.data import add_commands

Capture = pytest.CaptureFixture[str]


def lors(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(str(ended.code))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    written(folder / "tiny.yaml", tiny(folder, evaluate={"guard": ["it"]}))
    return folder


def test_a_table_and_a_page(folder: Path, capsys: Capture) -> None:
    assert lors("data", "check", folder / "tiny.yaml") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == ["utterances", "hours", "median", "s", "longest", "s", "speakers", "translated",
                                "misfits", "rejected"]  # fmt: skip
    found = {tuple(line.split()[:2]): int(line.split()[2]) for line in lines[1:8]}
    assert found == {
        **{(language, split): count for language in ("es", "fr")
           for split, count in (("train", 6), ("validation", 2), ("test", 3))},
        ("it", "test"): 3,
    }  # fmt: skip
    assert lines[-1] == (
        f"The page is {folder / 'out' / 'data-check.html'}, the figures are in data-check.json beside it."
    )
    assert "14 steps, 0 of them cached" in said.err
    assert "prepare it test: done in" in said.err
    assert "<h1>Data of tiny.yaml</h1>" in (folder / "out" / "data-check.html").read_text("utf-8")


def test_json_is_what_the_file_holds(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert lors("data", "check", folder / "tiny.yaml", "--out", tmp_path / "here", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "here" / "data-check.json").read_text("utf-8"))
    assert [(split["language"], split["split"]) for split in shown["splits"]][-2:] == [("fr", "test"), ("it", "test")]
    assert shown["failed"] is False


def test_settings_can_be_changed(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    changes = ("--set", "corpora.utterances.train=2", "--set", "tasks=[transcribe]", "--out", tmp_path)
    assert lors("data", "check", folder / "tiny.yaml", *changes, "--json") == 0
    said = capsys.readouterr()
    shown = json.loads(said.out)
    assert {split["utterances"] for split in shown["splits"] if split["split"] == "train"} == {2}
    assert shown["tasks"] == ["transcribe"]


def test_an_error_is_exit_code_1_and_its_sentence(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    settings: dict[str, Any] = tiny(tmp_path, corpora_of={"fr": {"source": "manifest", "path": "/no/{split}.jsonl"}})
    file = written(tmp_path / "broken.yaml", settings | {"store": str(folder / "store")})
    assert lors("data", "check", file) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("es train")
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 3
    assert errors[0].startswith(
        "error    fr train: the split cannot be prepared: the manifest /no/train.jsonl does not"
    )


def test_nothing_at_all_can_be_prepared(tmp_path: Path, capsys: Capture) -> None:
    settings = tiny(tmp_path, corpora={"source": "manifest", "path": "no/{language}/{split}.jsonl"})
    assert lors("data", "check", written(tmp_path / "no.yaml", settings)) == 1
    assert capsys.readouterr().out.startswith("No split could be prepared.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "the experiment file none.yaml does not exist"),
        (["tiny.yaml", "--set", "bas=x"], "unknown key 'bas', did you mean 'base'?"),
        (["tiny.yaml", "--set", "languages=[es, tlh]"], "the base starter has no token for 'tlh'"),
        (["tiny.yaml", "--out", "tiny.yaml/x"], "tiny.yaml/x cannot be written"),
        ([], "the following arguments are required: FILE"),
    ],
)
def test_the_users_mistakes(
    folder: Path, arguments: list[str], message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert lors("data", "check", *arguments) == 2
    assert message in capsys.readouterr().err


def test_help_has_an_example_and_the_exit_codes(capsys: Capture) -> None:
    assert lors("data", "check", "--help") == 0
    shown = capsys.readouterr().out
    assert "lors data check deployments/demo.yaml --set" in shown
    assert "exit code: 0, 1 where there is an error" in shown
    assert lors("data") == 2


@pytest.mark.parametrize("before", [True, False])
def test_json_may_stand_before_and_after_the_subcommand(before: bool) -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()

    def add(name: str, command: Any, *texts: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name)
        made.add_argument("--json", action="store_true")
        made.set_defaults(command=command)
        return made

    add_commands(add)
    words = ["data", "--json", "check", "f"] if before else ["data", "check", "f", "--json"]
    assert parser.parse_args(words).json
    assert not parser.parse_args(["data", "check", "f"]).json


def test_prefect_is_not_imported(folder: Path) -> None:
    code = (
        "import sys\n"
        "from flows.cli import main\n"
        f"code = main(['data', 'check', {str(folder / 'tiny.yaml')!r}])\n"
        "assert 'prefect' not in sys.modules\n"
        "sys.exit(code)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, timeout=120).returncode == 0
