"""Names and paths in files that may come from somebody else do not leave their folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st
from report_folders import write_run

from lors.config import Experiment, parse_experiment
from lors.errors import CheckpointError, ConfigError, InputError, LorsError
from lors.evaluation import name_models
from lors.files import is_safe
from lors.model_folder import weight_files
from lors.outputs import _publish_model, publish_scores
from lors.pipeline import KnownSplit, Sources, build_steps
from lors.report import write_report
from lors.report.run import load_run, load_runs
from lors.s3_bucket import check_url
from lors.s3_mirror import Mirror, _is_mirrored
from lors.speech.corpora import hub
from lors.speech.corpora.settings import CommonVoiceCorpora, FolderCorpora, ManifestCorpora
from lors.speech.corpora.sources import candidates, describe
from lors.speech.corpus import Candidate
from lors.store import Artifact, Store, _check_address, _digest, step_key
from lors.sweep import Variant
from lors.versions import rollback

BAD = {
    "empty": "",
    "dot": ".",
    "parent": "..",
    "in the parent": "../secret",
    "by the parent": "a/../../secret",
    "absolute": "/etc/hostname",
    "two slashes": "//etc/hostname",
    "in itself": "a/./b",
    "a slash at the end": "a/",
    "backslash": "..\\secret",
    "drive": "C:/secret",
    "drive alone": "C:secret",
    "NUL": "a\0b",
    "line": "a\nb",
    "surrogate": "a\udce9",
    "right to left": "a\u202egpj.exe",
    "long": "a" * 256,
    "long in bytes": "é" * 128,
}
WORDS = st.one_of(st.text(max_size=12), st.text("./\\a:\0~", max_size=12))

bad = pytest.mark.parametrize("name", BAD.values(), ids=BAD)


# A name in a manifest of the store


@bad
def test_a_file_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    assert not is_safe(name)
    files = {name: "0" * 64}
    with pytest.raises(InputError, match="is not a plain relative one"):
        Artifact.from_json({"stage": "prune", "key": "0" * 32, "digest": _digest(files), "files": files, "summary": {}})


@given(WORDS)
@example("hypotheses-größe.parquet")
@example("a b/c..d/~")
def test_a_name_that_is_taken_stays_inside(name: str) -> None:
    if is_safe(name):
        root = Path("/a/root")
        path = Path(os.path.normpath(root / name))
        assert path.is_relative_to(root)
        assert path != root
        assert path.relative_to(root).as_posix() == name
        assert len(os.fsencode(name)) == len(name.encode())


def test_usual_names_are_taken() -> None:
    for name in ("model.safetensors", "a/b.json", "hypotheses-größe.parquet", "merges (1).txt", "..a", "~", "a..b"):
        assert is_safe(name), name


@given(WORDS, WORDS)
@example("prune", "0" * 32)
@example("prune\n", "0" * 32)
@example("prune", "0" * 32 + "\n")
def test_an_address_is_a_stage_and_a_key(stage: str, key: str) -> None:
    try:
        _check_address(stage, key)
    except ValueError:
        return
    assert not {"/", ".", "\\", "\0", "\n"} & {*stage, *key}
    assert stage
    assert len(key) == 32


STEP: dict[str, Any] = {"version": 1, "settings": {}, "inputs": {}}


def made(store: Store, stage: str, files: dict[str, str]) -> Artifact:
    with store.produce(stage, step_key(stage, **STEP), **STEP) as production:
        for name, content in files.items():
            (production.out / name).parent.mkdir(parents=True, exist_ok=True)
            (production.out / name).write_text(content)
        return production.publish({}, 1.0)


@pytest.mark.parametrize("name", ["hypotheses-{outside}/x", "hypotheses-../x", "sub/results.csv"])
def test_scores_with_names_that_leave_the_output_are_not_published(name: str, tmp_path: Path) -> None:
    store, output = Store(tmp_path / "store"), tmp_path / "deep" / "output"
    name = name.format(outside=tmp_path)
    scores = {"summary.json": '{"systems": {}}', "table.md": "", name: "planted"}
    artifact = made(store, "score_systems", scores)
    assert store.find("score_systems", artifact.key) == artifact
    with pytest.raises(LorsError, match="which it did not make; delete its entry"):
        publish_scores(output, {}, {"score systems": artifact}, (), store)
    written = {path for path in tmp_path.rglob("*") if path.is_file() and store.root not in path.parents}
    assert {path for path in written if path.read_text() == "planted"} == set()


def test_a_model_is_published_without_what_its_manifest_does_not_name(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("private")
    store = Store(tmp_path / "store")
    artifact = made(store, "write_model", {"README.md": "card", "model.safetensors": "weights", "a/b.json": "{}"})
    (store.path(artifact) / "tokenizer.json").symlink_to(tmp_path / "private")
    (store.path(artifact) / "extra").write_text("extra")
    _publish_model(store, artifact, tmp_path / "model", str.upper)
    found = {path.relative_to(tmp_path / "model").as_posix() for path in (tmp_path / "model").rglob("*.*")}
    assert found == {"README.md", "model.safetensors", "a/b.json"}
    assert (tmp_path / "model" / "README.md").read_text() == "CARD"


# What another machine left of a step in a bucket


class Bucket:
    """Of one file, with a state that names others."""

    url = "s3://bucket"

    def __init__(self, files: dict[str, Any]) -> None:
        self._state = json.dumps({"id": "1", "files": files}).encode()
        self.asked: list[str] = []

    def get(self, name: str) -> tuple[bytes, str]:
        return self._state, "etag"

    def list(self, folder: str) -> dict[str, Any]:
        return {name: SimpleNamespace(size=7) for name in ("mirror.json", "1/training/a", "../secret")}

    def download(self, name: str, path: Path) -> None:
        self.asked.append(name)
        path.write_text("planted")

    def delete(self, name: str) -> None:
        self.asked.append(name)


@pytest.mark.parametrize(
    "name", [*BAD.values(), "training/../../x", "training/a/b", "training/.x", "/a.jsonl", "x.txt"]
)
@pytest.mark.parametrize("where", ["file", "object"])
def test_a_mirror_s_state_leads_nowhere_else(name: str, where: str, tmp_path: Path) -> None:
    if where == "object" and is_safe(name):
        return
    work = tmp_path / "work" / "step"
    work.mkdir(parents=True)
    entry = {"object": name if where == "object" else "1/training/a", "bytes": 7}
    bucket: Any = Bucket({name if where == "file" else "training/a": entry})
    Mirror(bucket, "work/step", work, lambda: None).fetch()
    assert bucket.asked == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@given(WORDS, st.sampled_from(["", "training/", "training"]), st.sampled_from(["", ".jsonl"]))
def test_what_is_mirrored_is_in_the_work_folder(middle: str, head: str, tail: str) -> None:
    name = f"{head}{middle}{tail}"
    if _is_mirrored(name):
        path = Path(os.path.normpath(Path("/w") / name))
        assert path.parent in (Path("/w"), Path("/w/training"))


@given(st.text("s3:/ab.c@?#~\\\0\n-_%", max_size=24).map("s3://".__add__))
@example("s3://bucket/..")
@example("s3://bucket/../other")
@example("s3://bucket/a/./b")
@example("s3://bucket//a")
def test_a_bucket_s_staging_folder_is_in_its_own(url: str) -> None:
    try:
        place = check_url(url).removeprefix("s3://")
    except ValueError:
        return
    assert Path(os.path.normpath(Path("/staging") / place)).relative_to("/staging").as_posix() == place


# Names that become files: languages, systems, variants, versions


@given(WORDS)
@example("es\n")
@example("../es")
def test_an_expert_s_file_is_in_its_folder(language: str) -> None:
    settings = {"base": "starter", "corpora": {"source": "synthetic"}, "output": "out"}
    try:
        experiment = parse_experiment(settings | {"languages": [language], "evaluate": {"guard": []}})
    except ConfigError:
        return
    assert all(is_safe(f"{expert.id}.safetensors") and "/" not in expert.id for expert in experiment.experts)


@given(WORDS)
@example("..=model")
@example("../x=model")
@example("größe=model")
def test_a_system_s_file_is_in_its_folder(text: str) -> None:
    try:
        named = name_models([text])
    except InputError:
        return
    assert all(is_safe(f"hypotheses-{name}.parquet") and "/" not in name for name in named)


@given(WORDS, WORDS)
def test_a_variant_s_folder_is_in_the_output(key: str, value: str) -> None:
    experiment = Experiment.model_construct()
    folder = Variant.model_construct(name=f"{key}={value}", experiment=experiment).folder
    assert "/" not in folder
    assert folder not in ("", ".", "..")


@bad
def test_no_version_but_those_that_are_kept_is_put_back(name: str, tmp_path: Path) -> None:
    output = tmp_path / "outputs" / "run"
    summary = {
        "model": "lors, in model/",
        "scaling": 0.3,
        "systems": {},
        "steps": [],
        "digests": {"write lors": "a"},
        "experiment": {"base": "b", "languages": [], "tasks": [], "merge": {"method": "lors"}},
    }
    for folder in (output, output / "versions" / "v1", tmp_path / "outputs" / "secret"):
        (folder / "model").mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="keeps no version"):
        rollback(output, name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_version_s_list_of_files_leads_nowhere_else(tmp_path: Path) -> None:
    from test_versions import publish

    publish(tmp_path / "out", "aaaa")
    publish(tmp_path / "out", "bbbb")
    (tmp_path / "planted").write_text("planted")
    listed = tmp_path / "out" / "versions" / "v1" / "files.json"
    digests = json.loads(listed.read_text())
    for name in ("../../../planted", str(tmp_path / "planted")):
        listed.write_text(json.dumps(digests | {name: "0" * 64}))
        with pytest.raises(CheckpointError, match="the kept version v1 is damaged"):
            rollback(tmp_path / "out", "v1")
    (tmp_path / "out" / "versions" / "v1" / "version.json").write_text(
        json.dumps({"name": "../../secret", "created": "", "how": "", "model": ""})
    )
    listed.write_text(json.dumps(digests))
    with pytest.raises(CheckpointError, match="the kept version v1 is damaged"):
        rollback(tmp_path / "out", "v1")


# An output that somebody sent, in a report


def test_a_report_reads_no_hypotheses_from_elsewhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", utterances=3)
    summary = json.loads((run / "summary.json").read_text())
    outside = tmp_path / "private.parquet"
    shutil.copy(run / "hypotheses" / "base.parquet", outside)
    means = summary["systems"]["base"]
    for name in (str(outside.with_suffix("")), "../../private", "../hypotheses/base"):
        changed = {**summary, "systems": {**summary["systems"], name: means}}
        (run / "summary.json").write_text(json.dumps(changed))
        assert set(load_run(run).hypotheses()) == set(summary["systems"])


def test_a_sweep_names_no_folder_but_its_own(tmp_path: Path) -> None:
    sweep, other = tmp_path / "sweep", write_run(tmp_path / "other", utterances=3)
    (sweep / "a").mkdir(parents=True)
    for folder in (*BAD.values(), "../other", "a/../../other", str(other)):
        variant = {"name": "a", "folder": folder, "changes": {}, "seed": None}
        (sweep / "sweep.json").write_text(json.dumps({"variants": [variant], "means": []}))
        with pytest.raises(InputError, match="which is not in"):
            load_runs([sweep])
    with pytest.raises(InputError, match="which is not in"):
        write_report([sweep], tmp_path / "page.html")


# A model folder


@bad
def test_an_index_names_no_shard_of_another_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    for place in (tmp_path / "secret", folder / "a" / "b", folder / "..\\secret"):
        place.write_text("")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="lacks the shard"):
        weight_files(folder)


# Speech


def sound(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, [0.1, -0.1] * 4000, 16000)
    return path


def rows(corpora: Any, split: str = "train") -> tuple[dict[str, Candidate], dict[str, str]]:
    source = describe(corpora, "es", split)
    settings = {"source": corpora.source, "language": "es", "split": split, **source.settings}
    return {row.source: row for row in candidates(settings, source.places)}, source.outside


def test_a_folder_of_audio_reads_nothing_outside(tmp_path: Path) -> None:
    folder = tmp_path / "speech"
    outside = sound(tmp_path / "private" / "a.wav")
    sound(folder / "train" / "a.wav")
    sound(folder / "shared" / "b.wav")
    (tmp_path / "disk").mkdir()
    sound(tmp_path / "disk" / "c.wav")
    (folder / "linked").symlink_to(tmp_path / "disk")  # the user's own doing
    inside = ["a.wav", "../shared/b.wav", "../linked/c.wav", str(folder / "shared" / "b.wav")]
    leaving = ["../../private/a.wav", str(outside), "x/../../../private/a.wav"]
    lines = [json.dumps({"file_name": name, "text": "hola"}) for name in (*inside, *leaving)]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    corpora = FolderCorpora(source="folder", path=str(folder))
    found, digests = rows(corpora)
    assert {name for name, row in found.items() if row.fault is None} == set(inside)
    for name in inside:
        assert found[name].load()[1] == 16000
    assert {found[name].fault for name in leaving} == {("path outside the corpus", f"it leaves {folder}")}
    outside.write_bytes(b"other")
    assert rows(corpora)[1] == digests  # it was not even read


def test_common_voice_reads_its_clips_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cv" / "es"
    outside = sound(tmp_path / "private.wav")
    sound(folder / "clips" / "a.wav")
    names = ["a.wav", "../../../private.wav", str(outside), "../train.tsv"]
    (folder / "train.tsv").write_text("client_id\tpath\tsentence\n" + "".join(f"x\t{name}\thola\n" for name in names))
    corpora = CommonVoiceCorpora(source="common_voice", path=str(tmp_path / "cv"))
    found, digests = rows(corpora)
    assert {name for name, row in found.items() if row.fault is None} == {"a.wav"}
    assert {row.fault[0] for row in found.values() if row.fault} == {"path outside the corpus"}
    outside.write_bytes(b"other")
    assert rows(corpora)[1] == digests


def test_a_manifest_may_name_audio_anywhere_but_only_files(tmp_path: Path) -> None:
    """Its paths are its author's, who is the user; but a device or a pipe has no end."""
    elsewhere = sound(tmp_path / "disk" / "a.wav")
    os.mkfifo(tmp_path / "pipe")
    names = ["../disk/a.wav", str(elsewhere), "/dev/zero", str(tmp_path / "pipe"), "..", "a\0b", "a" * 300]
    (tmp_path / "es").mkdir()
    lines = [json.dumps({"audio": name, "text": "hola", "id": str(n)}) for n, name in enumerate(names)]
    (tmp_path / "es" / "train.jsonl").write_text("\n".join(lines))
    found, _ = rows(ManifestCorpora(source="manifest", path=f"{tmp_path}/{{language}}/{{split}}.jsonl"))
    for name in names[:2]:
        assert found[name].load()[1] == 16000
    for name in names[2:]:
        with pytest.raises(OSError):  # noqa: PT011
            found[name].load()


@pytest.mark.parametrize("name", [*BAD.values()][1:], ids=[*BAD][1:])
def test_a_memo_of_a_data_set_leads_nowhere_else(name: str) -> None:
    commit = "0" * 40
    assert hub._known(json.dumps({"commit": commit, "files": [["es/train.parquet"]]})) is not None
    for files, revision in (([["es/train.parquet", name]], commit), ([["a.parquet"]], name), (name, commit)):
        assert hub._known(json.dumps({"commit": revision, "files": files})) is None
    for text in ("", "[]", "{", "null", '{"commit": 1, "files": []}', '{"files": [[1]], "commit": "' + commit + '"}'):
        assert hub._known(text) is None


def test_what_a_run_says_of_a_split_is_of_that_split(tmp_path: Path) -> None:
    settings = {"base": "starter", "languages": ["es"], "corpora": {"source": "synthetic"}, "output": "out"}
    experiment, store = parse_experiment(settings), Store(tmp_path)
    known = dict(build_steps(experiment, store)["prepare es train"].settings)
    for wrong in ({"split": "../../../planted"}, {"split": "test"}, {"language": "fr"}):
        own = KnownSplit(settings=known | wrong, outside={})
        with pytest.raises(InputError, match="'prepare es train' holds is of another language or split"):
            build_steps(experiment, store, Sources(base=None, splits={"prepare es train": own}))
    own = KnownSplit(settings=known, outside={})
    assert build_steps(experiment, store, Sources(base=None, splits={"prepare es train": own}))
