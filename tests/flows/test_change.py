"""A language more and a language less, on the tiny experiment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from subprocess import PIPE
from typing import Any

import pytest
from flows_helpers import Done, tiny, written
from prefect.client.orchestration import get_client
from processes import within

from flows.pipeline import add_language, full_pipeline, remove_language
from lors.config import load_experiment
from lors.errors import InputError, WorseError
from lors.lease import hold
from lors.versions import history
from tasks.runtime import LISTENERS


def test_a_language_comes_and_goes_and_no_model_is_lost(done: Done) -> None:
    out = done.folder / "changed"
    file = written(done.folder / "changed.yaml", tiny(done.folder, output=str(out), diagnose=False))
    before = file.read_text()
    full_pipeline(file=file)
    first = (out / "model" / "model.safetensors").read_bytes()

    with pytest.raises(InputError, match="the tolerance nan is not a number of points"):
        add_language(file, "it", tolerance=float("nan"))  # nothing is more than that
    with pytest.raises(WorseError) as refused:
        add_language(file, "it", tolerance=-1000)  # whatever it is, it is worse
    said = str(refused.value)
    assert "es WER" in said
    assert "Take it anyway with --accept" in said
    assert "| es | WER |" in said
    assert file.read_text() == before
    assert (out / "model" / "model.safetensors").read_bytes() == first
    assert [version["name"] for version in history(out)] == ["v1"]
    assert json.loads((out / "candidate" / "summary.json").read_text())["experiment"]["languages"] == ["es", "fr", "it"]

    added = add_language(file, "it", tolerance=-1000, accept=True)
    assert added["computed"] == []  # the refused attempt computed it
    assert load_experiment(file).languages == ("es", "fr", "it")
    assert not (out / "candidate").exists()
    assert (out / "model" / "model.safetensors").read_bytes() != first
    assert [(version["name"], version["how"]) for version in history(out)] == [("v2", "add-language it"), ("v1", "run")]

    removed = remove_language(file, "it", tolerance=1000)
    assert [name for name in removed["computed"] if name.startswith(("prepare", "fine-tune", "extract"))] == []
    assert load_experiment(file) == load_experiment(written(done.folder / "first.yaml", json.loads(json.dumps(
        tiny(done.folder, output=str(out), diagnose=False)
    ))))  # fmt: skip
    assert (out / "model" / "model.safetensors").read_bytes() == first
    with get_client(sync_client=True) as client:
        query = {"artifacts": {"key": {"any_": ["lors-change"]}}}
        assert "| it | WER |" in client.request("POST", "/artifacts/filter", json=query).text


def test_what_is_edited_meanwhile_stays_and_what_cannot_be_changed_is_said(done: Done) -> None:
    out, file = done.folder / "edited", done.folder / "edited.yaml"
    settings = tiny(done.folder, output=str(out), merge={"scaling": 0.3})
    written(file, settings)
    full_pipeline(file=file)
    edits = [lambda text: text.replace("scaling: 0.3", "scaling: 0.35 # edited"), lambda text: "languages: [\n"]

    def edit(step: str, event: Mapping[str, Any]) -> None:
        if step == "write lors" and event.get("finished"):
            file.write_text(edits.pop(0)(file.read_text()))

    LISTENERS.append(edit)
    try:
        remove_language(file, "fr", tolerance=1000)
        assert "scaling: 0.35 # edited" in file.read_text()
        assert load_experiment(file).languages == ("es",)
        with pytest.raises(InputError, match=r"has the new model, but .* could not be changed") as error:
            add_language(file, "fr", tolerance=1000)
    finally:
        LISTENERS.remove(edit)
    assert "give it languages: [es, fr], as " in str(error.value)
    assert file.read_text() == "languages: [\n"
    assert [version["how"] for version in history(out)] == ["add-language fr", "remove-language fr", "run"]


def test_a_flow_wants_an_experiment_or_its_file(done: Done) -> None:
    for arguments in ({}, {"experiment": done.make(), "file": done.folder / "changed.yaml"}):
        with pytest.raises(InputError, match="either an experiment or the file of one"):
            full_pipeline(**arguments)
    with pytest.raises(InputError, match="`changes` are of a file's settings"):
        full_pipeline(done.make(), changes=("diagnose=false",))


def test_who_waits_for_an_output_reads_the_file_when_it_is_his_turn(done: Done) -> None:
    file, said = done.folder / "turn.yaml", list[str]()
    written(file, tiny(done.folder))

    def listen(step: str, event: Mapping[str, Any]) -> None:
        said.append(f"{step}: {event.get('message', '')}")

    waiting = threading.Thread(target=full_pipeline, kwargs={"file": file})
    LISTENERS.append(listen)
    try:
        with hold(done.folder / "out" / ".lock", "the output"):
            waiting.start()
            assert within(60, lambda: any(line.startswith("output: Waiting for the output ") for line in said))
            written(file, tiny(done.folder, diagnose=False))
        waiting.join(120)
    finally:
        LISTENERS.remove(listen)
    assert not waiting.is_alive()
    summary = json.loads((done.folder / "out" / "summary.json").read_text())
    assert summary["experiment"]["diagnose"] is False
    full_pipeline(done.make())


def test_so_does_the_command(done: Done) -> None:
    file, out = done.folder / "command.yaml", done.folder / "command"
    settings = tiny(done.folder, merge={"scaling": 0.3}, output=str(out))
    written(file, settings | {"languages": ["es"]})
    command = [sys.executable, "-m", "flows.cli", "run", str(file), "--set", "diagnose=false"]
    with hold(out / ".lock", "the output"), (done.folder / "said").open("w+") as said:
        run = subprocess.Popen(command, env=os.environ | {"PREFECT_API_URL": done.api}, stdout=PIPE, stderr=said)
        assert within(120, lambda: "Waiting for the output " in (done.folder / "said").read_text() or run.poll())
        written(file, settings)
    printed = run.communicate(timeout=120)[0].decode()
    assert run.returncode == 0
    experiment = json.loads((out / "summary.json").read_text())["experiment"]
    assert (experiment["languages"], experiment["diagnose"]) == (["es", "fr"], False)
    assert "| es WER | fr WER |" in printed
    assert re.search(r"^[0-9]+ steps computed, [0-9]+ cached[.]$", printed, re.MULTILINE)
