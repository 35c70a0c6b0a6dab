"""`lors merge | prune | apply | diagnose | export-lora` as a newcomer, a script and an adversary meet them."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.cli import _parser, main
from lors.checkpoint import Checkpoint
from lors.delta_file import DeltaFile
from lors.merging import METHODS, make_recipe
from lors.merging.registry import STEPS

COMMANDS = ("merge", "prune", "apply", "diagnose", "export-lora")
FC1 = "model.encoder.layers.0.fc1.weight"
Capture = pytest.CaptureFixture[str]


class Models(NamedTuple):
    """Folders of tiny real Whispers, and compact experts of two of them."""

    base: Path
    es: Path
    fr: Path
    it: Path
    other: Path  # another base
    es_file: Path
    fr_file: Path


def whisper(folder: Path, seed: int, vocabulary: int = 64, d_model: int = 16) -> Path:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=vocabulary, num_mel_bins=8, d_model=d_model, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_source_positions=20, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("checkpoints")
    folders = [whisper(root / name, seed) for seed, name in enumerate(("base", "es", "fr", "it", "other"))]
    files = [root / "es.safetensors", root / "fr.safetensors"]
    for folder, file in zip(folders[1:], files, strict=False):
        assert main(["prune", "--base", str(folders[0]), "--expert", str(folder), "--out", str(file)]) == 0
    return Models(*folders, *files)


def lors(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(str(ended.code))


Run = Callable[..., str]


@pytest.fixture
def ran(capfd: Capture) -> Run:
    """Runs a command that must succeed; gives its standard output."""

    def run(*arguments: object) -> str:
        capfd.readouterr()
        code = lors(*arguments)
        captured = capfd.readouterr()
        assert code == 0, captured.err
        assert all(re.fullmatch(r"\w+: \d+%", line) for line in captured.err.splitlines()), captured.err
        return captured.out

    return run


@pytest.fixture
def facts(ran: Run) -> Callable[..., Any]:
    return lambda *arguments: json.loads(ran(*arguments, "--json"))


@pytest.fixture
def refused(capfd: Capture, tmp_path: Path) -> Run:
    """Runs a command that must end with exit code 2 and leave tmp_path as it was; gives its one line of error."""

    def run(*arguments: object) -> str:
        before = tree(tmp_path)
        capfd.readouterr()
        code = lors(*arguments)
        captured = capfd.readouterr()
        *progress, line = captured.err.splitlines()
        assert (code, captured.out) == (2, ""), captured
        assert all(re.fullmatch(r"\w+: \d+%", text) for text in progress), captured.err
        assert line.startswith("lors: ")
        assert tree(tmp_path) == before
        return line

    return run


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def merging(models: Models, *names: str) -> list[object]:
    return ["--base", models.base, *(x for name in names for x in ("--expert", getattr(models, name)))]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# A newcomer


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_of_the_help_parses(command: str, capfd: Capture) -> None:
    assert lors(command, "--help") == 0
    examples = capfd.readouterr().out.partition("for example:\n")[2].strip().splitlines()
    assert examples
    for example in examples:
        words = example.split()
        assert words[:2] == ["lors", command]
        _parser().parse_args(words[1:])


def test_the_list_has_everything(ran: Run, facts: Callable[..., Any]) -> None:
    rows, text = {row["name"]: row for row in facts("merge", "--list")}, ran("merge", "--list")
    assert list(rows) == list(METHODS)
    for name, method in METHODS.items():
        row = rows[name]
        assert (row["formula"], row["reference"], row["scaling"]) == (
            method.formula, method.reference, method.scaling_default,
        )  # fmt: skip
        assert row["parameters"].keys() == method.parameters.keys()
        assert f"{name}\n    {method.formula}\n    {method.reference}\n" in text
        for parameter, (field, default) in method.parameters.items():
            own = row["parameters"][parameter]
            assert own["meaning"]
            assert own["default"] == json.loads(json.dumps(default, default=str))
            assert f"      {parameter} = " in text
            if field.annotation in (float, int, bool):
                assert own["allowed"]
    assert rows["ties"]["parameters"]["density"]["allowed"] == "above 0, up to 1"
    assert rows["ties"]["parameters"]["scope"]["allowed"] == "tensor | model"
    assert rows["tsv_m"]["parameters"]["rank_ratio"]["allowed"] == "above 0, up to 1"
    assert rows["linear"]["parameters"]["normalize"]["allowed"] == "true | false"
    for name in (*STEPS, "embeddings", "mergekit", "peft", "fusionbench"):
        assert f"\n{name}\n    " in text


def test_merge(models: Models, tmp_path: Path, ran: Run, facts: Callable[..., Any]) -> None:
    out = tmp_path / "merged"
    experts = ["--expert", f"a={models.es}", "--expert", f"b={models.fr_file}"]
    found = facts("merge", "--base", models.base, *experts, "--weight", "a=0.25", "--out", out, "--workers", 2)
    assert found.keys() == {
        "out", "method", "scaling", "recipe", "weights", "parameters", "retained_energy", "digest", "seconds",
    }  # fmt: skip
    assert (found["method"], found["scaling"], found["weights"]) == ("lors", 0.4, {"a": 0.25, "b": 1.0})
    assert found["parameters"] == Checkpoint(models.base).parameters
    assert found["digest"] == Checkpoint(out).digest()
    assert found["retained_energy"]["b"] == DeltaFile(models.fr_file).retained_energy
    assert {path.name for path in out.iterdir()} == {path.name for path in models.base.iterdir()} | {"README.md"}
    text = ran("merge", *merging(models, "es"), "--out", tmp_path / "one", "--scaling", -0.5)
    assert re.fullmatch(
        r"merged 1 expert by lors with scaling -0\.5 into \S+one \(8\.4 k parameters, .* s, es keeps .*energy\)\n", text
    )


def test_the_options_are_the_recipe(models: Models, tmp_path: Path, facts: Callable[..., Any]) -> None:
    merge = ["merge", *merging(models, "es", "fr")]
    number = iter(range(100))

    def recipe(*options: object) -> Any:
        return facts(*merge, "--out", tmp_path / f"{next(number)}", *options)["recipe"]

    def made(*arguments: Any, **options: Any) -> Any:
        return make_recipe(*arguments, **options).model_dump(mode="json")

    assert recipe("--method", "ties", "--like", "peft", "--set", "density=1e-1", "--set", "scope=model") == made(
        "ties", {"density": 0.1, "scope": "model"}, like="peft"
    )
    assert recipe("--method", "linear", "--set", "normalize=off") == made("linear", {"normalize": False})
    assert recipe(
        "--group", "encoder:scaling=0.3", "--group", "*fc1*:exclude=true", "--group", "encoder:density=0.2"
    ) == (made("lors", groups={"*fc1*": {"exclude": True}, "encoder": {"scaling": 0.3, "density": 0.2}}))
    steps = recipe("--method", "tsv_m", "--prune", "magnitude:density=0.5,scope=tensor", "--prune", "star")["steps"]
    assert [(step["kind"], step.get("density")) for step in steps] == [("magnitude", 0.5), ("star", None)]
    step = recipe("--prune", "lors:include=encoder,include=*fc1*,rank_ratio=1")["steps"][0]
    assert (step["include"], step["rank_ratio"]) == (["encoder", "*fc1*"], 1.0)
    step = recipe("--composition", "sequential", "--rank-ratio", 0.5, "--exclude", "embeddings")["steps"][0]
    assert (step["composition"], step["rank_ratio"], step["exclude"]) == ("sequential", 0.5, ["embeddings"])


def test_a_recipe_from_a_model_card_gives_the_same_model(models: Models, tmp_path: Path, ran: Run) -> None:
    options = ["--method", "dare_ties", "--set", "seed=7", "--prune", "lors", "--group", "decoder:scaling=0.2"]
    ran("merge", *merging(models, "es", "fr"), "--out", tmp_path / "a", *options)
    card = (tmp_path / "a" / "README.md").read_text("utf-8")
    provenance = json.loads(card.partition("```json\n")[2].partition("```")[0])
    assert provenance["experts"].keys() == {"es", "fr"}
    (tmp_path / "recipe.json").write_text(json.dumps(provenance["recipe"]))
    ran("merge", *merging(models, "fr", "es"), "--out", tmp_path / "b", "--recipe", tmp_path / "recipe.json")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_short_recipe_is_the_method(models: Models, tmp_path: Path, facts: Callable[..., Any]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: ties\ndensity: 1e-1\nscaling: 0.7\ngroups: {encoder: {exclude: true}}\n")
    found = facts("merge", *merging(models, "es"), "--out", tmp_path / "a", "--recipe", file)["recipe"]
    options: Any = {"scaling": 0.7, "groups": {"encoder": {"exclude": True}}}
    assert found == make_recipe("ties", {"density": 0.1}, **options).model_dump(mode="json")
    found = facts("merge", *merging(models, "es"), "--out", tmp_path / "b", "--recipe", file, "--scaling", 0.1)
    assert found["recipe"]["scaling"] == 0.1
    file.write_text("method: ties\nsteps: [{kind: star}]\n")
    found = facts("merge", *merging(models, "es"), "--out", tmp_path / "c", "--recipe", file)["recipe"]
    assert ([step["kind"] for step in found["steps"]], found["combine"]["kind"]) == (["star"], "ties")


def test_one_at_a_time_equals_all_at_once(models: Models, tmp_path: Path, ran: Run, facts: Callable[..., Any]) -> None:
    into = tmp_path / "all.safetensors"
    ran("merge", "--into", into, *merging(models, "it"), "--method", "ties", "--workers", 1)
    ran("merge", "--into", into, *merging(models, "es"))
    found = facts("merge", "--into", into, *merging(models, "fr"), "--remove", "it", "--out", tmp_path / "step")
    assert (found["into"], found["out"]) == (str(into), str(tmp_path / "step"))
    assert (found["method"], found["scaling"], found["experts"].keys()) == ("ties", 1.0, {"es", "fr"})
    ran("merge", *merging(models, "es", "fr"), "--out", tmp_path / "once", "--method", "ties")
    assert weights(tmp_path / "step") == weights(tmp_path / "once")
    half = tmp_path / "half"
    text = ran("merge", "--into", into, "--out", half, "--scaling", 0.5)
    told = "holds 2 experts (es, fr) merged by ties; the merged model, with scaling 0.5, is in"
    assert text == f"{into} {told} {half}\n"
    ran("merge", *merging(models, "es", "fr"), "--out", tmp_path / "other", "--method", "ties", "--scaling", 0.5)
    assert weights(half) == weights(tmp_path / "other")
    ran("merge", "--into", into, "--remove", f"es={models.es}", "--remove", "fr", "--out", tmp_path / "none")
    assert weights(tmp_path / "none") == weights(models.base)


def test_prune_apply_and_export(models: Models, tmp_path: Path, ran: Run, facts: Callable[..., Any]) -> None:
    out = tmp_path / "es.safetensors"
    prune = ["prune", *merging(models, "es"), "--out"]
    found = facts(*prune, out, "--budget", "45kB")
    file = DeltaFile(out)
    assert found.keys() >= {"out", "bytes", "retained_energy", "dtype", "settings", "digest"}
    assert (found["bytes"], found["digest"]) == (out.stat().st_size, file.digest())
    assert found["bytes"] <= 45_000
    assert found["retained_energy"] == file.retained_energy
    text = ran(*prune, tmp_path / "b.safetensors", "--rank-ratio", 1, "--dtype", "bfloat16", "--vectors", "drop")
    assert re.fullmatch(r"\S+/b\.safetensors: \d+\.\d kB, \d+\.\d% of the task vector's energy\n", text)
    found = facts("apply", *merging(models, "es_file"), "--out", tmp_path / "applied")
    assert found.keys() == {"out", "parameters", "digest"}
    delta = DeltaFile(models.es_file).delta(FC1)
    applied = load_file(tmp_path / "applied" / "model.safetensors")[FC1]
    torch.testing.assert_close(applied, load_file(models.base / "model.safetensors")[FC1] + delta)
    found = facts("export-lora", *merging(models, "es_file"), "--out", tmp_path / "lora")
    assert found["modules"][FC1.removesuffix(".weight")] == 2
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip
    assert "a LoRA adapter of" in ran("export-lora", *merging(models, "es_file"), "--out", tmp_path / "lora2")
    ran("apply", "--base", models.other, "--expert", models.es_file, "--out", tmp_path / "forced", "--force")


def test_diagnose(models: Models, tmp_path: Path, ran: Run, facts: Callable[..., Any]) -> None:
    diagnose, out = ["diagnose", *merging(models, "es", "fr_file")], tmp_path / "made" / "diagnosis"
    found = facts(*diagnose, "--out", out)
    assert {path.name for path in out.iterdir()} == {"diagnosis.json", "diagnosis.html"}
    assert json.loads((out / "diagnosis.json").read_text("utf-8")) == found
    assert "<svg" in (out / "diagnosis.html").read_text("utf-8")
    text = ran(*diagnose)
    assert "| es |" in text
    assert "diagnosis.html" not in text


def test_a_path_may_hold_an_equals_sign(models: Models, tmp_path: Path, facts: Callable[..., Any]) -> None:
    folder = tmp_path / "lr=1e-5" / "whisper-0.5"
    folder.parent.mkdir()
    folder.symlink_to(models.es)
    found = facts("merge", "--base", models.base, "--expert", folder, "--out", tmp_path / "out")
    assert found["weights"] == {"whisper-0.5": 1.0}


# An adversary

WRONG_OPTIONS = [
    ("--method tees", "no merging method 'tees'; did you mean ties?"),
    ("--method ties --set denisty=0.1", "no parameter 'denisty', did you mean 'density'?"),
    ("--method ties --set density", "'density' is not NAME=VALUE"),
    ("--method ties --set density=", "'density=' is not NAME=VALUE"),
    ("--method ties --set density=on", "density: Input should be a valid number, not 'on'"),
    ("--method ties --set density=[", "density: Input should be a valid number, not '['"),
    ("--method ties --set density=0", "density: Input should be greater than 0, not '0'"),
    ("--method ties --set density=-0.1", "density: Input should be greater than 0"),
    ("--method ties --set density=nan", "density: Input should be a finite number"),
    ("--method ties --set density=inf", "density: Input should be"),
    ("--method ties --set scope=no", "scope: Input should be 'tensor' or 'model', not 'no'"),
    ("--method dare_ties --set seed=1.5", "seed: Input should be a valid integer, not '1.5'"),
    ("--method ties --rank-ratio 0.1", "the method ties does not prune by LoRS"),
    ("--method lors --like peft", "there is no preset of lors; there are dare_linear"),
    ("--like mergekt", "invalid choice: 'mergekt'"),
    ("--prune lor", "no prune step 'lor'; did you mean lors?"),
    (
        "--prune lors:rank_rato=0.1",
        "rank_rato is no setting of lors; see `lors merge --list` (did you mean rank_ratio?)",
    ),
    ("--prune lors:rank_ratio", "'rank_ratio' is not NAME=VALUE"),
    ("--prune lors:include=encodr", "no parameter of base belongs to 'encodr'"),
    ("--exclude encodr", "no parameter of base belongs to 'encodr'"),
    ("--group encodr:scaling=0.3", "no parameter of base belongs to the group 'encodr'"),
    ("--group encoder:scalin=0.3", "the group encoder: scalin is no setting of a group"),
    ("--group encoder:scaling=nan", "the group encoder: scaling: Input should be a finite number"),
    ("--group encoder:exclude=maybe", "exclude: Input should be a valid boolean, not 'maybe'"),
    ("--group encoder", "--group 'encoder' is not GROUP:NAME=VALUE"),
    ("--scaling nan", "the scaling coefficient is nan; give a finite number"),
    ("--scaling=-inf", "the scaling coefficient is -inf; give a finite number"),
    ("--scaling half", "argument --scaling: invalid float value: 'half'"),
    ("--rank-ratio 0", "--rank-ratio 0.0: Input should be greater than 0"),
    ("--density nan", "--density nan: Input should be"),
    ("--refinements -1", "--refinements -1: Input should be greater than or equal to 0"),
    ("--refinements 1 --composition sparse", "lors: refinements need the composition additive, not sparse"),
    ("--weight it=1", "the weight of 'it' belongs to no expert; the experts are es, fr"),
    ("--weight es", "--weight 'es' is not ID=NUMBER"),
    ("--weight es=1e400", "the weight of 'es' is inf"),
    ("--method linear --weight es=0 --weight fr=0", "the merge weights sum to 0"),
    ("--workers 0", "argument --workers: '0' is not a number from 1 on"),
    ("--workers \N{SUPERSCRIPT TWO}", "is not a number from 1 on"),
    ("--remove es", "--remove takes an expert out of an accumulator; name it with --into"),
    ("--expert =x", "--expert '=x' is not ID=MODEL or MODEL"),
    ("--expert x=", "--expert 'x=' is not ID=MODEL or MODEL"),
    ("--expert es=x", "two experts are named 'es'"),
    ("--method ties --group encoder:rank_ratio=0.2", "the group encoder: ties has no rank_ratio, so it would change"),
    ("--recipe nowhere.yaml", "the recipe nowhere.yaml cannot be read (No such file or directory)"),
    ("--recipe nowhere.yaml --set density=1", "--recipe holds the method and all its settings"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_wrong_options(options: str, message: str, models: Models, tmp_path: Path, refused: Run) -> None:
    assert message in refused("merge", *merging(models, "es", "fr"), "--out", tmp_path / "out", *options.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; write `method: ties`"),
        ("- ties", "is no mapping but ['ties']"),
        ("a: [", "cannot be read (while parsing"),
        ("method: tees", "no merging method 'tees'; did you mean ties?"),
        ("method: ties\ndenisty: 0.1", "no parameter 'denisty', did you mean 'density'?"),
        ("method: ties\ndensity: on", "density is true; write a number, or a word in quotes"),
        ("steps: [{kind: magnitude, density: yes}]", "density is true"),
        ("stepz: []", "stepz is no setting of it; see `lors merge --list` (did you mean steps?)"),
        ("steps: [{kind: magnitud}]", "steps.0 is of no known kind; did you mean magnitude?"),
        ("scaling: .nan", "scaling: Input should be a finite number"),
        ("method: ties\n1: 2", "ties has no parameter '1'"),
    ],
)
def test_wrong_recipes(text: str, message: str, models: Models, tmp_path: Path, refused: Run) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    line = refused("merge", *merging(models, "es"), "--out", tmp_path / "out", "--recipe", file)
    assert f"the recipe {file}" in line
    assert message in line


def test_nothing_is_given(models: Models, tmp_path: Path, refused: Run) -> None:
    out = ["--out", tmp_path / "out"]
    assert "--base is missing; see `lors merge --help`" in refused("merge")
    assert "--out is missing" in refused("merge", *merging(models, "es"))
    assert "no expert was given; give at least one" in refused("merge", *merging(models), *out)
    assert "no expert was given; give at least one" in refused("diagnose", *merging(models), *out)
    for command in ("prune", "apply", "export-lora"):
        assert "the following arguments are required: --expert" in refused(command, *merging(models), *out)


def test_what_is_not_there_or_of_another_kind(models: Models, tmp_path: Path, refused: Run) -> None:
    out, nothing = ["--out", tmp_path / "out"], tmp_path / "nothing"
    (tmp_path / "file").write_text("text")
    for place in (nothing, tmp_path / "file", f"es={tmp_path / 'file'}"):
        assert "is not a folder; give a model folder" in refused(
            "merge", "--base", models.base, "--expert", place, *out
        )
    assert "is not a folder; give a model folder" in refused("merge", "--base", nothing, "--expert", models.es, *out)
    for command in ("merge", "apply", "export-lora", "diagnose"):
        line = refused(command, "--base", models.base, "--expert", tmp_path / "no.safetensors", *out)
        assert "no.safetensors cannot be read as a delta file (No such file" in line
        line = refused(command, "--base", models.base, "--expert", models.es / "model.safetensors", *out)
        assert "is not a LoRS delta file" in line
        assert "give the model's folder" in line
    for command in ("apply", "export-lora"):
        assert f"{command} takes a compact expert (.safetensors), not {models.es}" in refused(
            command, *merging(models, "es"), *out
        )
    prune = ["prune", "--base", models.base, "--out", tmp_path / "out.safetensors", "--expert"]
    assert "was pruned before; give the model folder" in refused(*prune, models.es_file)


def test_an_output_that_exists_is_left_alone(models: Models, tmp_path: Path, refused: Run) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    shutil.copy(models.fr_file, tmp_path / "fr.safetensors")
    for out in (tmp_path / "file", tmp_path / "folder"):
        for command in ("merge", "apply", "export-lora", "diagnose"):
            line = refused(command, *merging(models, "es_file"), "--out", out)
            assert f"{out} is already there and not empty; choose another" in line
    shutil.copytree(models.es, tmp_path / "es")
    for out in (tmp_path / "fr.safetensors", tmp_path / "es" / "model.safetensors"):
        line = refused("prune", "--base", models.base, "--expert", tmp_path / "es", "--out", out)
        assert f"{out} is already there; choose another file or remove it" in line
    assert "let it end in .safetensors" in refused("prune", *merging(models, "es"), "--out", tmp_path / "es.bin")
    assert "cannot write" in refused("merge", *merging(models, "es"), "--out", tmp_path / "file" / "out")
    assert "cannot write" in refused("prune", *merging(models, "es"), "--out", tmp_path / "file" / "out.safetensors")


def test_experts_of_another_base(models: Models, tmp_path: Path, refused: Run) -> None:
    out = ["--out", tmp_path / "out"]
    digests = Checkpoint(models.base).digest()[:12], Checkpoint(models.other).digest()[:12]
    for command in ("merge", "apply", "export-lora", "diagnose"):
        line = refused(command, "--base", models.other, "--expert", models.es_file, *out)
        assert f"{models.es_file} was extracted from another base (digest {digests[0]}) than other" in line
    line = refused("merge", "--base", models.other, "--expert", models.es_file, *out)
    assert digests[1] in line
    assert "give that base, prune es again, or force it" in line
    wide = whisper(tmp_path / "wide", 0, d_model=32)
    line = refused("merge", "--base", models.base, "--expert", wide, *out)
    assert "is [16, 32] in wide but [16, 16] in base; give an expert that was fine-tuned from this base" in line
    assert "but [16, 32] in wide" in refused("apply", "--base", wide, "--expert", models.es_file, *out, "--force")
    larger = whisper(tmp_path / "larger", 0, vocabulary=70)
    line = refused("merge", "--base", models.base, "--expert", larger, *out)
    assert "the tensor model.decoder.embed_tokens.weight is [70, 16] in larger but [64, 16] in base" in line
    line = refused(
        "merge", *merging(models, "es_file", "fr_file"), *out, "--set", "rank_ratio=0.2", "--set", "density=0.3"
    )
    assert "was pruned with other settings; leave the pruning settings out" in line
    line = refused("merge", *merging(models, "es_file"), *out, "--method", "ties", "--prune", "lors:density=0.7")
    assert "was pruned with other settings" in line


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(size: Callable[[int, int], int]) -> Callable[[Path], object]:
    """Cuts the weights off: `size` of (the header's bytes, the file's)."""

    def change(folder: Path) -> None:
        data = weights(folder)
        (folder / "model.safetensors").write_bytes(data[: size(8 + int.from_bytes(data[:8], "little"), len(data))])

    return change


def indexed(content: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )

    return change


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (cut(lambda header, size: 0), "cannot be read as safetensors"),
    (cut(lambda header, size: 5), "it is corrupt or cut off: copy it again"),
    (cut(lambda header, size: header // 2), "it is corrupt or cut off: copy it again"),
    (cut(lambda header, size: header), "it is corrupt or cut off: copy it again"),
    (cut(lambda header, size: size - 1), "it is corrupt or cut off: copy it again"),
    (lambda f: (f / "model.safetensors").write_bytes(weights(f) + b"more"), "it is corrupt or cut off"),
    (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + weights(f)[8:]), "header too large"),
    (lambda f: (f / "model.safetensors").write_bytes(b"<!DOCTYPE html>" * 99), "cannot be read as safetensors"),
    (indexed({"weight_map": {FC1: "two.safetensors"}}), "lacks the shard two.safetensors"),
    (indexed({"weight_map": {FC1: "../one.safetensors"}}), "lacks the shard ../one.safetensors"),
    (indexed({"weight_map": {"a": "one.safetensors"}}), "one.safetensors lacks the tensor a"),
    (indexed({"weight_map": {}}), "has no weight_map"),
    (indexed(""), "model.safetensors.index.json cannot be read as JSON"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights only"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "save_pretrained(FOLDER)` and give that"),
    (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors and no model.safetensors.index.json"),
    (lambda f: (f / "config.json").unlink(), "has no config.json; give the whole folder"),
    (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    (lambda f: (f / "config.json").write_text('{"model_type": "bart"}'), "(model_type bart, not whisper)"),
    (lambda f: changed(f, lambda t: t.pop(FC1)), f"the tensor {FC1} is absent in broken"),
    (lambda f: changed(f, lambda t: t.update(lora=torch.ones(2))), "the tensor lora is [2] in broken but absent"),
    (lambda f: changed(f, lambda t: t[FC1].fill_(float("nan"))), f"broken: the tensor {FC1} holds NaN or infinity"),
    (lambda f: changed(f, lambda t: t[FC1][3, 3:4].fill_(-float("inf"))), f"the tensor {FC1} holds NaN or infinity"),
    (lambda f: changed(f, lambda t: t.update({FC1: t[FC1].to(torch.float8_e4m3fn)})), "is F8_E4M3, a quantised dtype"),
    (lambda f: changed(f, lambda t: t.update({FC1: t[FC1].to(torch.int8)})), f"{FC1} is torch.int8 in broken"),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_broken_experts(number: int, models: Models, tmp_path: Path, refused: Run) -> None:
    break_it, message = BROKEN[number]
    break_it(shutil.copytree(models.es, tmp_path / "broken"))
    broken = ["--base", models.base, "--expert", tmp_path / "broken"]
    for command, out in (("merge", "out"), ("prune", "out.safetensors"), ("diagnose", "out")):
        assert message in refused(command, *broken, "--out", tmp_path / out)
    assert message in refused("merge", *broken, "--expert", models.fr, "--into", tmp_path / "all.safetensors")


def test_broken_compact_experts(models: Models, tmp_path: Path, refused: Run) -> None:
    data, file = models.es_file.read_bytes(), tmp_path / "es.safetensors"
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        for command in ("merge", "apply", "export-lora", "diagnose"):
            line = refused(command, "--base", models.base, "--expert", file, "--out", tmp_path / "out")
            assert f"{file} cannot be read as a delta file" in line
    save_file({"a": torch.ones(2)}, file)
    line = refused("apply", "--base", models.base, "--expert", file, "--out", tmp_path / "out")
    assert f"{file} is not a LoRS delta file" in line


def test_wrong_prunes(models: Models, tmp_path: Path, refused: Run) -> None:
    prune = ["prune", *merging(models, "es"), "--out", tmp_path / "es.safetensors"]
    assert "a budget of 1000 bytes does not hold" in refused(*prune, "--budget", "1kB")
    for size in ("20XB", "much", "1e9", "nan"):
        assert f"the size '{size}' is not a number and a unit; write 20MB" in refused(*prune, "--budget", size)
    assert "the size '0' is not above 0" in refused(*prune, "--budget", "0")
    assert "--budget chooses ranks and densities; leave it or --rank-ratio out" in refused(
        *prune, "--budget", "1MB", "--rank-ratio", "0.1"
    )
    assert "invalid choice: 'float8'" in refused(*prune, "--dtype", "float8")
    assert "no parameter of base belongs to 'fc9'" in refused(*prune, "--include", "fc9")
    sparse = tmp_path / "sparse.safetensors"
    assert lors("prune", *merging(models, "es"), "--out", sparse, "--composition", "sparse") == 0
    line = refused("export-lora", "--base", models.base, "--expert", sparse, "--out", tmp_path / "lora")
    assert "has no low-rank part that a LoRA can hold" in line
    for command in ("apply", "export-lora"):
        line = refused(command, *merging(models, "es_file"), "--out", tmp_path / "out", "--scaling", "nan")
        assert "the scaling coefficient is nan" in line


def test_wrong_accumulators(models: Models, tmp_path: Path, refused: Run) -> None:
    into = tmp_path / "all.safetensors"
    merge, out = ["merge", "--into", into], ["--out", tmp_path / "out"]
    assert "is not there yet: give --base and at least one --expert" in refused(*merge, "--expert", models.es)
    assert "slerp needs all experts together" in refused(*merge, *merging(models, "es"), "--method", "slerp")
    assert "the scaling coefficient is nan" in refused(*merge, *merging(models, "es"), "--scaling", "nan")
    place = shutil.copytree(models.es, tmp_path / "es")
    assert lors(*merge, "--base", models.base, "--expert", place, "--method", "ties") == 0
    cases: list[tuple[list[object], str]] = [
        ([], "there is nothing to do: give --expert, --remove or --out"),
        (["--expert", place], "'es' is in"),
        (["--expert", models.fr, "--method", "ties"], "was begun with ties, and its recipe cannot change"),
        (["--expert", models.fr, "--base", models.other], "is of another base"),
        ([*out, "--base", models.other], "is of another base than other"),
        (["--expert", models.fr, "--weight", "x=1"], "the weight of 'x' belongs to no expert"),
        ([*out, "--weight", "es=1"], "--weight is of an expert that is added"),
        ([*out, "--scaling", "nan"], "the scaling coefficient is nan"),
        (["--expert", models.fr, "--scaling", "0.5"], "--scaling is of the merged model; give --out as well"),
        (["--remove", "fr"], "there is no expert 'fr' in"),
        (["--remove", "="], "--remove '=' is not ID or ID=MODEL"),
        (["--remove", f"es={models.fr}"], "is not the one in"),
        (["--expert", models.fr, "--out", place], "is already there and not empty"),
    ]
    for arguments, message in cases:
        assert message in refused(*merge, *arguments)
    line = refused(*merge, *out, "--scaling", "1e300")
    assert "is changed already" not in line
    shutil.rmtree(place)
    line = refused(*merge, "--remove", "es")
    assert f"the expert 'es' is no longer at {place}; say where it is now with --remove es=MODEL" in line
    for file in (tmp_path / "all.txt", tmp_path):
        assert "is no name for an accumulator" in refused("merge", "--into", file, *merging(models, "es"))
    shutil.copy(models.es_file, tmp_path / "x.safetensors")
    line = refused("merge", "--into", tmp_path / "x.safetensors", *merging(models, "es"))
    assert "x.safetensors is no accumulator of version 1" in line
    (tmp_path / "x.safetensors").write_bytes(into.read_bytes()[:-1])
    assert "corrupt or cut off" in refused("merge", "--into", tmp_path / "x.safetensors", *merging(models, "es"))


def test_an_accumulator_that_has_the_expert_though_the_model_cannot_be_written(
    models: Models, tmp_path: Path, capfd: Capture
) -> None:
    into = tmp_path / "all.safetensors"
    given = ["merge", "--into", into, *merging(models, "es"), "--scaling", "1e300", "--out", tmp_path / "out"]
    assert lors(*given) == 2
    assert f"{into} is changed already: next time give --out without --expert" in capfd.readouterr().err
    assert lors("merge", "--into", into, "--out", tmp_path / "out", "--scaling", "1") == 0


def test_an_expert_pruned_to_a_budget_is_not_of_these_settings(models: Models, tmp_path: Path, refused: Run) -> None:
    file = tmp_path / "es.safetensors"
    assert lors("prune", *merging(models, "es"), "--budget", "45kB", "--out", file) == 0
    given = ["merge", "--base", models.base, "--expert", file, "--out", tmp_path / "out"]
    assert "was pruned with other settings" in refused(*given, "--rank-ratio", "0.1", "--density", "0.1")
    assert lors(*given) == 0


def test_a_base_that_moved_is_asked_for(models: Models, tmp_path: Path, refused: Run) -> None:
    base, into = shutil.copytree(models.base, tmp_path / "base"), tmp_path / "all.safetensors"
    assert lors("merge", "--into", into, "--base", base, "--expert", models.es) == 0
    moved = base.rename(tmp_path / "moved")
    line = refused("merge", "--into", into, "--expert", models.fr)
    assert f"the base of {into} is not where it was" in line
    assert line.endswith("name it with --base")
    assert lors("merge", "--into", into, "--expert", models.fr, "--base", moved) == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a small disk; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> Path:
        command = ["mount", *options, str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs root and mount")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


FULL = [
    *((command, "es_file", size) for command in ("merge", "apply", "export-lora", "diagnose") for size in (8, 12)),
    ("merge", "es", 40),  # the weights have room, the other files do not
    ("merge", "es", 48),
    *(("prune", "es", size) for size in (8, 24, 48)),  # at 48 its parts have room, the file made of them does not
    *(("into", "es", size) for size in (8, 40)),
]


@pytest.mark.parametrize(("command", "expert", "size"), FULL)
def test_a_full_disk_leaves_nothing(
    command: str, expert: str, size: int, models: Models, disk: Callable[..., Path], refused: Run
) -> None:
    out = disk("-t", "tmpfs", "-o", f"size={size}k", "tmpfs") / ("out" if expert == "es_file" else "out.safetensors")
    start = ["merge", "--into", out] if command == "into" else [command, "--out", out]
    line = refused(*start, *merging(models, expert))
    assert re.search(rf"cannot write {out} \(.*No space left on device.*\); choose a place that is writable", line)


def test_a_disk_that_fills_while_pruned_experts_lie_on_it(
    models: Models, disk: Callable[..., Path], refused: Run
) -> None:
    folder = disk("-t", "tmpfs", "-o", "size=60k", "tmpfs")  # room for the model alone
    options = ["--method", "ties", "--prune", "lors"]
    line = refused("merge", *merging(models, "es", "fr", "it"), "--out", folder / "out", *options)
    assert "(No space left on device); choose a place that is writable and has room" in line


def test_an_accumulator_on_a_full_disk_stays_as_it_was(models: Models, disk: Callable[..., Path], refused: Run) -> None:
    folder = disk("-t", "tmpfs", "-o", "size=120k", "tmpfs")
    into = folder / "all.safetensors"
    assert lors("merge", "--into", into, *merging(models, "es")) == 0
    assert "(No space left on device)" in refused("merge", "--into", into, *merging(models, "fr"))


def test_a_read_only_disk(models: Models, disk: Callable[..., Path], refused: Run) -> None:
    folder = disk("-t", "tmpfs", "-o", "ro", "tmpfs")
    for command in COMMANDS:
        expert, out = ("es", "out.safetensors") if command == "prune" else ("es_file", "out")
        line = refused(command, *merging(models, expert), "--out", folder / out)
        assert f"cannot write {folder / out} (Read-only file system); choose a place" in line
    for options in ([], ["--method", "ties", "--prune", "lors"]):
        line = refused("merge", "--into", folder / "all.safetensors", *merging(models, "es"), *options)
        assert "all.safetensors (Read-only file system)" in line


def test_a_disk_of_its_own_as_the_output(models: Models, disk: Callable[..., Path], refused: Run) -> None:
    folder = disk("-t", "tmpfs", "tmpfs")
    for command in ("merge", "apply", "export-lora", "diagnose"):
        line = refused(command, *merging(models, "es_file"), "--out", folder)
        assert f"{folder} is a disk of its own, which no folder can be renamed to; name a folder inside it" in line


# Being stopped, and what is seen meanwhile

STOPPED = [("merge", "out"), ("prune", "out.safetensors"), ("diagnose", "out"), ("apply", "out")]


def test_a_second_ctrl_c_does_not_stop_the_cleaning_up(
    models: Models, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def interrupted(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        remove(*arguments, **options)

    monkeypatch.setattr("lors.model_writer.shutil.rmtree", interrupted)
    monkeypatch.setattr("flows.checkpoints._bar", stub_bar(lambda done, total: os.kill(os.getpid(), signal.SIGINT)))
    before = signal.getsignal(signal.SIGINT)
    assert lors("apply", *merging(models, "es_file"), "--out", tmp_path / "out") == 130
    assert capfd.readouterr().err == "lors: stopped; nothing half-written is left\n"
    assert tree(tmp_path) == {}
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("command", "out"), STOPPED)
def test_ctrl_c_leaves_nothing(
    command: str, out: str, models: Models, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def line(done: int, total: int) -> None:
        seen.append(done)
        if 2 * done > total:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("flows.checkpoints._bar", stub_bar(line))
    assert lors(command, *merging(models, "es" if command == "prune" else "es_file"), "--out", tmp_path / out) == 130
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "lors: stopped; nothing half-written is left\n")
    assert seen
    assert tree(tmp_path) == {}


def stub_bar(advance: Callable[[int, int], None]) -> Any:
    import contextlib

    return lambda title: contextlib.nullcontext(advance)


def test_ctrl_c_leaves_the_accumulator_as_it_was(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = ["merge", "--into", tmp_path / "all.safetensors"]
    assert lors(*merge, *merging(models, "es")) == 0
    before = tree(tmp_path)
    monkeypatch.setattr("flows.checkpoints._bar", stub_bar(lambda done, total: os.kill(os.getpid(), signal.SIGINT)))
    assert lors(*merge, *merging(models, "fr")) == 130
    assert tree(tmp_path) == before


def test_what_a_killed_run_left_is_named_and_in_nobody_s_way(models: Models, tmp_path: Path, capfd: Capture) -> None:
    code = (
        "import os, signal, sys, contextlib, flows.checkpoints as c, flows.cli\n"
        "die = lambda done, total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "c._bar = lambda title: contextlib.nullcontext(die)\n"
        "flows.cli.main(sys.argv[1:])\n"
    )
    merge = ["merge", *map(str, merging(models, "es_file")), "--out", str(tmp_path / "out")]
    assert subprocess.run([sys.executable, "-c", code, *merge], check=False, timeout=100).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.out\.\w+\.partial", left.name)
    capfd.readouterr()
    assert lors(*merge) == 0
    captured = capfd.readouterr()
    assert captured.out.startswith("merged 1 expert ")
    assert f"lors: {left} is what a killed run left; remove it unless that run still goes on" in captured.err
    assert {path.name for path in tmp_path.iterdir()} == {"out", left.name}


def test_progress_in_a_log_is_a_line_a_quarter(models: Models, tmp_path: Path, capfd: Capture) -> None:
    capfd.readouterr()
    assert lors("merge", *merging(models, "es"), "--out", tmp_path / "out", "--json") == 0
    captured = capfd.readouterr()
    json.loads(captured.out)
    lines = captured.err.splitlines()
    assert 1 <= len(lines) <= 4
    assert lines[-1] == "merging: 100%"


def test_progress_in_a_terminal_is_a_bar(models: Models, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "merge",
        *map(str, merging(models, "es")),
        "--out",
        str(tmp_path / "o"),
    ]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                chunk = os.read(controller, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not chunk:
                break
            shown += chunk
        assert process.stdout is not None
        result = process.stdout.read().decode()
    os.close(controller)
    assert process.returncode == 0
    assert b"merging" in shown
    assert b"merging: 25%" not in shown
    assert re.fullmatch(r"merged 1 expert by lors .*\n", result)


def test_a_pipe_that_closes_early_is_no_error() -> None:
    command = f"{sys.executable} -m flows.cli merge --list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "breadcrumbs\n", "")
