"""Commands as a user meets them: exit codes, one sentence an error, examples, JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows_helpers import Done, planned, tiny, written
from safetensors.torch import load_file, save_file

from flows.cli import main
from lors.changes import TOLERANCE
from lors.starter import MODEL_FOLDER

Refused = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must end with exit code 2; gives its one line of error."""

    def run(*arguments: str | Path) -> str:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = int(str(error.code))
        captured = capfd.readouterr()
        assert (code, captured.out) == (2, "")
        line = captured.err.rstrip("\n")
        assert line.startswith("lors: ")
        assert "\n" not in line
        return line

    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetun": {"steps": 3}}, "unknown key 'finetun', did you mean 'finetune'?"),
        ({"prune": {"rank_rato": 0.1}}, "unknown key 'prune.rank_rato', did you mean 'rank_ratio'?"),
        ({"prune": {"rank_ratio": 0}}, "prune.rank_ratio should be greater than 0, not 0"),
        ({"base": "no/such/folder"}, "no/such/folder is not a folder; give a model folder"),
        ({"languages": ["es", "qq"]}, "the base starter has no token for 'qq', choose another language or base"),
        ({"languages": ["es", "ja"]}, "the synthetic corpus does not speak 'ja', choose from ca, de"),
        ({"merge": {"method": "lor"}}, "'lor' is not a merging method, did you mean 'lors'?"),
        ({"corpora": {"source": "manifest", "path": "none/{language}-{split}.jsonl"}}, "none/es-train.jsonl"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_wrong_experiment(
    command: str, changes: dict[str, Any], message: str, refused: Refused, tmp_path: Path
) -> None:
    assert message in refused(command, written(tmp_path / "e.yaml", tiny(tmp_path, **changes)))
    assert not (tmp_path / "store" / "entries").exists()


def test_a_wrong_file_or_setting(refused: Refused, tmp_path: Path) -> None:
    file = written(tmp_path / "e.yaml", tiny(tmp_path))
    assert "prune.rank_ratio should be greater than 0, not 0" in refused("plan", file, "--set", "prune.rank_ratio=0")
    assert "is not key=value" in refused("plan", file, "--set", "prune.rank_ratio")
    assert "nowhere.yaml does not exist: check the path" in refused("run", tmp_path / "nowhere.yaml")
    assert "the value is not valid YAML" in refused("plan", file, "--set", "prune.rank_ratio=2020-13-01")
    line = refused("add-language", file, "it", "--corpora", "data/it")
    assert "--corpora 'data/it' is no mapping: say where the speech is as in '{source: folder, path: data/it}'" in line
    for text in ("base: [", "output: 2020-13-01"):
        file.write_text(text)
        assert "is not valid YAML" in refused("run", file)
    assert "invalid choice: 'rum'" in refused("rum", file)
    assert "--set" in refused("run", file, "--set")


@pytest.mark.parametrize("name", ["output", "store"])
def test_a_folder_that_cannot_be_written(name: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    changes = {name: str(tmp_path / "file" / "folder")}
    line = refused("run", written(tmp_path / "e.yaml", tiny(tmp_path, **changes)))
    assert f"the folder {changes[name]} cannot be written (Not a directory)" in line
    assert "choose another one" in line
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", [["run", "--set", "seeds=[0, 1]"], ["sweep", "--grid", "prune.density=0.1,0.2"]])
def test_the_output_of_a_run_of_one_model_takes_no_sweep(command: list[str], refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("{}")
    name, *options = command
    line = refused(name, written(tmp_path / "e.yaml", tiny(tmp_path)), *options)
    assert f"the folder {tmp_path / 'out'} holds a run of one model" in line
    assert "name another folder with --set output=FOLDER" in line
    assert not (tmp_path / "store" / "entries").exists()


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    """A copy of the starter with every tensor a little larger."""
    folder = shutil.copytree(MODEL_FOLDER, tmp_path / "expert")
    tensors = {name: tensor * 1.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_merge(expert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    arguments = ["merge", "--base", "starter", "--expert", f"es={expert}", "--out", str(out), "--scaling", "0.5"]
    assert main([*arguments, "--method", "task_arithmetic", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["method"], facts["scaling"], facts["out"]) == ("task_arithmetic", 0.5, str(out))
    name = "model.decoder.embed_tokens.weight"
    merged, base = load_file(out / "model.safetensors")[name], load_file(MODEL_FOLDER / "model.safetensors")[name]
    torch.testing.assert_close(merged, base * 1.005)
    assert main([*arguments[:-4], "--out", str(tmp_path / "other")]) == 0
    assert "merged 1 expert by lors with scaling" in capfd.readouterr().out


def test_what_cannot_be_merged(expert: Path, refused: Refused, tmp_path: Path) -> None:
    base, out = ("merge", "--base", "starter"), ("--out", tmp_path / "merged")
    tensors = load_file(expert / "model.safetensors")
    name = "model.encoder.conv1.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, expert / "model.safetensors")
    line = refused(*base, "--expert", f"es={expert}", *out)
    assert f"the tensor {name} is [127, 80, 3] in expert but [128, 80, 3] in" in line
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(config | {"model_type": "wav2vec2", "architectures": ["Wav2Vec2"]}))
    line = refused(*base, "--expert", f"es={expert}", *out)
    assert "wav2vec2" in line.lower()
    (expert / "model.safetensors").rename(expert / "pytorch_model.bin")
    assert "pickled weights only" in refused(*base, "--expert", f"es={expert}", *out)
    missing = tmp_path / "missing"
    assert f"{missing} is not a folder" in refused(*base, "--expert", missing, *out)
    assert "--out is missing; see `lors merge --help`" in refused(*base, "--expert", expert)
    assert "no expert was given" in refused(*base, *out)
    assert "two experts are named 'es'" in refused(*base, "--expert", "es=a", "--expert", "es=b", *out)
    assert "--weight 'es' is not ID=NUMBER" in refused(*base, "--expert", "es=a", "--weight", "es", *out)
    assert "--rank-ratio 0.0: " in refused(*base, "--expert", "es=a", "--rank-ratio", "0", *out)
    assert "no merging method 'lor'; did you mean lors?" in refused(*base, "--expert", "es=a", "--method", "lor", *out)
    assert not (tmp_path / "merged").exists()


def test_the_methods_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--list", "--json"]) == 0
    methods = {row["name"]: row for row in json.loads(capfd.readouterr().out)}
    assert {"lors", "task_arithmetic", "weight_average"} <= methods.keys()
    assert "2502.17380" in methods["lors"]["reference"]
    assert main(["merge", "--list"]) == 0
    assert methods["lors"]["formula"] in capfd.readouterr().out


def test_help_says_the_tolerance_that_the_flow_has(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["add-language", "--help"])
    assert f"(default {TOLERANCE:g})" in capfd.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("command", ["run", "plan", "doctor"])
def test_help_shows_an_example_that_parses(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    from flows.cli import _parser

    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    example = capfd.readouterr().out.partition("example:\n")[2].strip()
    assert example.startswith(f"lors {command} ")
    _parser().parse_args(example.split()[1:])


def test_the_plan_is_printed_and_given_as_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "e.yaml", tiny(tmp_path))
    assert main(["plan", str(file), "--json"]) == 0
    steps = json.loads(capfd.readouterr().out)
    assert steps["to_run"] == len(steps["steps"])
    assert {"name", "stage", "cached", "reason", "seconds"} == steps["steps"][0].keys()
    assert main(["plan", str(file)]) == 0
    text = capfd.readouterr().out
    assert f"{steps['to_run']} of {steps['to_run']} steps to run, 0 cached in {tmp_path / 'store'}." in text
    assert "prepare es train" in text


def test_doctor(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lors.doctor._LOW_DISK", 0)
    assert main(["doctor", "--json"]) == 0
    assert all(check["ok"] for check in json.loads(capfd.readouterr().out))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert main(["doctor"]) == 1
    assert "FAIL  prefect api" in capfd.readouterr().out


def lors(*arguments: str | Path, api: str | None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if api is None else {"PREFECT_API_URL": api})
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def only_error(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a run, which is all there is on its standard error but for progress."""
    assert "Traceback" not in done.stderr
    *progress, error = done.stderr.rstrip("\n").splitlines()
    assert all(line[:8].count(":") == 2 for line in progress), done.stderr
    assert error.startswith("lors: ")
    return error


def test_an_api_that_does_not_answer_is_a_sentence(tmp_path: Path) -> None:
    done = lors("run", written(tmp_path / "e.yaml", tiny(tmp_path)), api="http://127.0.0.1:9/api")
    assert done.returncode == 1
    assert "the Prefect API http://127.0.0.1:9/api does not answer" in only_error(done)


def manifests(folder: Path, language: str, **splits: list[dict[str, str]]) -> str:
    import numpy as np
    import soundfile

    soundfile.write(folder / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 8000), 8000)
    for split, rows in splits.items():
        lines = [json.dumps({"audio": "a.wav", "id": str(number), **row}) for number, row in enumerate(rows)]
        (folder / f"{language}-{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return f"{folder}/{{language}}-{{split}}.jsonl"


def test_one_expert_that_cannot_be_trained_loses_nothing_else(prefect_api: str, tmp_path: Path) -> None:
    row = {"text": "hola"}
    path = manifests(tmp_path, "es", train=[row, row], validation=[row], test=[row])
    corpora = {"source": "manifest", "path": path}
    file = written(tmp_path / "e.yaml", tiny(tmp_path, languages=["es"], corpora=corpora))
    done = lors("run", file, api=prefect_api)
    assert done.returncode == 2
    error = only_error(done)
    assert "fine-tune es-translate: no utterance of the train split of es can be used to translate" in error
    assert "leave translate out of the tasks" in error
    assert done.stdout == ""
    plan = json.loads(lors("plan", file, "--json", api=prefect_api).stdout)
    finished = {step["name"] for step in plan["steps"] if step["cached"]}
    assert {"fine-tune es-transcribe", "evaluate expert es-transcribe", "evaluate base es"} <= finished


def test_an_empty_split_is_a_sentence(prefect_api: str, tmp_path: Path) -> None:
    path = manifests(tmp_path, "es", train=[], validation=[], test=[])
    corpora = {"source": "manifest", "path": path}
    done = lors("run", written(tmp_path / "e.yaml", tiny(tmp_path, languages=["es"], corpora=corpora)), api=prefect_api)
    assert done.returncode == 2
    assert "prepare es train: the train split of es is empty: its source has no rows" in only_error(done)


def test_a_cached_run_prints_the_table_or_json(done: Done) -> None:
    assert planned(done.make()) == set()
    file = written(done.folder / "e.yaml", tiny(done.folder))
    printed = lors("run", file, api=done.api)
    assert printed.returncode == 0
    assert printed.stdout.startswith("| system |")
    assert f"0 steps computed, {len(done.planned)} cached." in printed.stdout
    result = json.loads(lors("run", file, "--json", api=done.api).stdout)
    assert result["computed"] == []
    assert set(result["systems"]) == {"base", "experts", "switched", "lors"}


def servers() -> set[str]:
    """The numbers of the processes that serve a Prefect API of these tests."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            ours = os.environ["PREFECT_HOME"] in (file.parent / "environ").read_text()
            if ours and "prefect.server.api.server:create_app" in file.read_text():
                found.add(file.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")
def test_an_api_of_the_run_s_own_records_everything_and_ends(done: Done) -> None:
    before = servers()
    assert before
    file = written(done.folder / "e.yaml", tiny(done.folder))
    assert lors("run", file, api=None).returncode == 0
    assert servers() <= before
    with contextlib.closing(sqlite3.connect(Path(os.environ["PREFECT_HOME"]) / "prefect.db")) as database:
        name = f"full-pipeline {done.folder / 'out'}"
        runs = database.execute("select id, state_type from flow_run where name = ?", [name]).fetchall()
        assert [state for _, state in runs] == ["COMPLETED"]
        query = "select state_name, count(*) from task_run where flow_run_id = ? group by 1"
        assert database.execute(query, [runs[0][0]]).fetchall() == [("Cached", len(done.planned))]
