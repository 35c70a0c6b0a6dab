"""The pages say what the code does."""

from __future__ import annotations

import gzip
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from lors.config import load_experiment

ROOT = Path(__file__).parents[1]


def test_the_page_of_settings_is_what_its_script_prints() -> None:
    script = [sys.executable, "docs/experiment.py"]
    printed = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs/experiment.md").read_text("utf-8") == printed, (
        "run: python docs/experiment.py > docs/experiment.md"
    )


def test_every_setting_is_explained() -> None:
    page = (ROOT / "docs/experiment.md").read_text("utf-8")
    assert not re.findall(r"^\| `(?!train|validation|test)\w+` \|[^|]*\|  \|$", page, re.MULTILINE)


def test_the_pages_link_to_files_that_are_there() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "line", re.findall(r"^\.venv/bin/lors (.+)$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
)
def test_the_readme_names_commands_and_options_that_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *words = line.split()
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert [word for word in words if word.startswith("--") and word not in shown] == []


@pytest.mark.parametrize(
    "file", sorted({*re.findall(r"deployments/[\w.-]+\.yaml", (ROOT / "README.md").read_text("utf-8"))})
)
def test_the_readme_names_experiments_that_load(file: str) -> None:
    assert load_experiment(ROOT / file).languages


def test_the_real_speech_is_of_spoken_prompts_whose_text_is_whole(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "prompts_corpus.py"))
    folder = tmp_path / "usr/share/doc/asterisk-core-sounds-it"
    folder.mkdir(parents=True)
    lines = (
        "\ufeff; Core sounds, in Italian",
        "added: Aggiunto.",
        "beep: [un suono]",
        "at-tone: L'ora (breve  pausa) esatta: <tono> è...",
        "cannot: La chiamata non pu? essere completata.",
        "again: Vuole  riprovare?",
        "no colon",
    )
    with gzip.open(folder / "core-sounds-it.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    texts = {"added": "Aggiunto.", "at-tone": "L'ora esatta: è...", "again": "Vuole riprovare?"}
    assert script["transcripts"](tmp_path, "it") == texts
    splits = [script["split_of"](f"digits/{number}") for number in range(400)]
    assert {split: splits.count(split) // 40 for split in splits} == {"train": 6, "test": 2, "validation": 1}
