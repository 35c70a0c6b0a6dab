"""Fine-tuning: targets, batches, the schedule, and resuming with the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_jobs import examples, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from speech_sounds import utterance

from lors import config, stages
from lors.errors import ConfigError, InputError, StepFailedError, TrainingError
from lors.isolate import Slots
from lors.speech import finetune
from lors.speech.corpus import SPLITS, Candidate, Utterance, write_split
from lors.speech.finetune import LOG, Example, examples_for, fine_tune, learning_rate_for, validation_loss


class InterruptedTrainingError(Exception):
    pass


def settings(**changes: Any) -> config.Finetune:
    return config.Finetune(**{"steps": 12, "learning_rate": 3e-3, "batch_seconds": 8.0, **changes})


def interrupt_at(step: int) -> finetune.Report:
    def report(event: Any) -> None:
        if event["done"] == step:
            raise InterruptedTrainingError

    return report


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def log_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / LOG).read_text().splitlines()]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after each step."""
    monkeypatch.setattr(finetune, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(finetune, "_CHECKPOINT_SHARE", math.inf)


# Targets


def tokenizer_of(folder: Path) -> Any:
    from transformers import WhisperTokenizer

    return WhisperTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("task", "text"), [("transcribe", "hola 1"), ("translate", "hello")])
def test_labels(whisper_folder: Path, task: str, text: str) -> None:
    tokenizer = tokenizer_of(whisper_folder)
    (example,) = examples_for([utterance(1, 0.5)], tokenizer, "es", task, 128)
    # The token of the SPOKEN language for both tasks, and the leading space of Whisper's training texts.
    assert tokenizer.decode(example.labels) == f"<|es|><|{task}|><|notimestamps|> {text}<|endoftext|>"
    assert example.labels[-1] == tokenizer.eos_token_id
    assert example.labels.count(tokenizer.convert_tokens_to_ids("<|startoftranscript|>")) == 0


def test_utterances_without_a_usable_target_are_left_out(whisper_folder: Path) -> None:
    tokenizer = tokenizer_of(whisper_folder)
    utterances = [utterance(1, 0.5, None), utterance(2, 0.5, "x" * 5), utterance(3, 0.5, "x" * 6)]
    found = examples_for(utterances, tokenizer, "es", "translate", 10)  # 3 + space + letters + end
    assert [example.utterance.id for example in found] == ["u2"]
    assert len(found[0].labels) == 10
    assert examples_for(utterances[:1], tokenizer, "es", "translate", 100) == []


def test_language_that_the_tokenizer_lacks(whisper_folder: Path) -> None:
    """Its token would silently become the unknown token."""
    with pytest.raises(InputError, match=r"no language 'xx'"):
        examples_for([utterance(1, 0.5)], tokenizer_of(whisper_folder), "xx", "transcribe", 100)


def test_model_sees_what_the_labels_say() -> None:
    """A loss computed by hand from logits of teacher forcing, on a batch with padding in it."""
    model, found = tiny_model(), examples()
    total, tokens = 0.0, 0
    for example in found:
        decoder = torch.tensor([[1, *example.labels[:-1]]])
        mels = finetune.MelCache(80)
        seconds = finetune.window_for(example.utterance.seconds, 2.0)
        with torch.no_grad(), finetune.windowed(model, seconds) as frames:
            features = mels.batch([example.utterance], frames)
            logits = model(input_features=features, decoder_input_ids=decoder).logits[0]
        picked = logits.log_softmax(-1)[range(len(example.labels)), list(example.labels)]
        total -= float(picked.sum())
        tokens += len(example.labels)
    assert validation_loss(model, found, batch_seconds=0.1, window="auto") == pytest.approx(total / tokens, rel=1e-5)
    # A fixed window: then the mean does not depend on the batches, which hold different numbers of tokens.
    losses = [validation_loss(model, found, batch_seconds=seconds, window=2.0) for seconds in (1, 9, 1000)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


# Batches

lengths = st.lists(st.integers(1, 200).map(lambda n: n / 100), min_size=1, max_size=80)


def silent(seconds: list[float]) -> list[Example]:
    return [Example(Utterance(f"u{i}", "", None, None, s, b""), (0,)) for i, s in enumerate(seconds)]


def window(seconds: float) -> float:
    return finetune.window_for(seconds, 2.0)


@given(lengths, st.floats(0.5, 40))
def test_batches_cover_an_epoch_within_the_budget(seconds: list[float], budget: float) -> None:
    found = silent(seconds)
    batches = finetune._batches(found, budget, window, "1-0")
    assert sorted(index for batch in batches for index in batch) == list(range(len(found)))
    for batch in batches:
        padded = len(batch) * window(max(seconds[index] for index in batch))
        assert batch
        assert len(batch) == 1 or padded <= budget
    assert batches == finetune._batches(found, budget, window, "1-0")


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    found = silent([0.5 + 0.01 * number for number in range(60)])

    def taken(seed: int, count: int) -> list[list[int]]:
        schedule = finetune._schedule(found, settings(seed=seed), window)
        return [next(schedule) for _ in range(count)]

    an_epoch = len(finetune._batches(found, 8.0, window, "0-0"))
    twice = taken(0, 2 * an_epoch)
    assert twice == taken(0, 2 * an_epoch)
    assert twice != taken(1, 2 * an_epoch)
    assert twice[:an_epoch] != twice[an_epoch:]
    assert set(Counter(index for batch in twice for index in batch).values()) == {2}


# Training


@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.9])
def test_learning_rate_schedule(tmp_path: Path, warmup: float) -> None:
    result = fine_tune(tiny_model(), examples(), [], settings(warmup=warmup), tmp_path)
    rates = [entry["learning_rate"] for entry in log_of(tmp_path)]
    rising = max(1, round(12 * warmup))
    expected = [3e-3 * (step + 1) / rising for step in range(rising)]
    expected += [3e-3 * (12 - step) / (12 - rising) for step in range(rising, 12)]
    assert rates == pytest.approx(expected)
    assert max(rates) == pytest.approx(3e-3)
    assert result["steps"] == 12


def test_learning_rate_by_size(tmp_path: Path) -> None:
    sizes = (39e6, 74e6, 244e6, 769e6, 1550e6)
    assert [learning_rate_for(int(size)) for size in sizes] == [3.75e-5, 2.5e-5, 1.25e-5, 6.25e-6, 5e-6]
    result = fine_tune(tiny_model(), examples(2), [], settings(learning_rate=None, steps=1), tmp_path)
    assert result["learning_rate"] == 3.75e-5


def test_loss_goes_down(tmp_path: Path) -> None:
    model, found = tiny_model(), examples(4)
    before = validation_loss(model, found, batch_seconds=8, window="auto")
    events: list[Any] = []
    result = fine_tune(model, found, found, settings(steps=60, learning_rate=1e-2), tmp_path, events.append)
    assert result["validation_loss"] < 0.4 * before
    assert [event["done"] for event in events] == list(range(1, 61))
    assert all(event["samples_per_second"] > 0 and event["total"] == 60 for event in events)
    assert [entry["step"] for entry in log_of(tmp_path)] == list(range(1, 61))


def test_validation_reads_its_own_audio(tmp_path: Path) -> None:
    """Rows of two splits may have the same id."""
    train = examples(8)
    validation = [Example(replace(e.utterance, id=f"u{i}"), e.labels) for i, e in enumerate(reversed(train))]
    model = tiny_model()
    result = fine_tune(model, train, validation, settings(), tmp_path)
    expected = validation_loss(model, validation, batch_seconds=8, window="auto")
    assert result["validation_loss"] == round(expected, 5)


def test_freeze_leaves_tensors_as_they_are(tmp_path: Path) -> None:
    model = tiny_model()
    before = weights(model)
    fine_tune(model, examples(), [], settings(freeze=("model.encoder.*", "*.bias"), weight_decay=0.1), tmp_path)
    for name, tensor in weights(model).items():
        frozen = name.startswith("model.encoder.") or name.endswith(".bias")
        assert torch.equal(tensor, before[name]) == frozen, name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze": ("model.encodr.*",)}, "'model.encodr.*' fits no parameter of the base, such as 'model.encoder."),
        ({"freeze": ("*",)}, "leaves nothing to train"),
        ({"window": 1.0}, "utterance u11 lasts 1.6 s, more than the window of 1 s"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fine_tune(tiny_model(), examples(), [], settings(**changes), tmp_path)
    assert words in str(caught.value)


def test_bf16_is_refused_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert finetune._precision("auto", cpu) is finetune._precision("fp32", cpu) is torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert finetune._precision("bf16", cpu) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"this CPU only emulates bf16"):
        finetune._precision("bf16", cpu)


@pytest.mark.usefixtures("often")
def test_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^the loss became nan at step 2 with learning rate 1e\+38: lower"):
        fine_tune(tiny_model(), examples(), [], settings(learning_rate=1e38, warmup=0, clip=1e9), tmp_path)
    assert [entry["step"] for entry in log_of(tmp_path)] == [1]


def test_weights_that_are_not_finite_at_the_start(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.decoder.layer_norm.weight.data[3] = math.nan
    with pytest.raises(TrainingError, match=r"the loss became nan at step 1 "):
        fine_tune(model, examples(), [], settings(), tmp_path)


# Resuming

RANDOM = {
    "dropout": 0.2, "encoder_layerdrop": 0.4, "encoder_layers": 2, "apply_spec_augment": True, "mask_time_prob": 0.3,
    "mask_time_length": 4,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, RANDOM], ids=["plain", "dropout, layer drop and SpecAugment"])
@pytest.mark.usefixtures("often")
def test_resumes_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    found, validation = examples(), examples(3)
    undisturbed = tiny_model(**options)
    expected = fine_tune(undisturbed, found, validation, settings(weight_decay=0.1), tmp_path / "a")
    for step in (1, 3, 3, 8, 12):  # 1: before any checkpoint; 12: after the last step
        with pytest.raises(InterruptedTrainingError):
            fine_tune(tiny_model(**options), found, [], settings(weight_decay=0.1), tmp_path / "b", interrupt_at(step))
        with (tmp_path / "b" / LOG).open("a") as log:
            log.write('{"step": 1')  # half a line
    resumed = tiny_model(**options)
    result = fine_tune(resumed, found, validation, settings(weight_decay=0.1), tmp_path / "b")
    assert_same(weights(resumed), weights(undisturbed))
    assert result["validation_loss"] == expected["validation_loss"]
    assert (tmp_path / "a" / LOG).read_bytes() == (tmp_path / "b" / LOG).read_bytes()


@pytest.mark.usefixtures("often")
def test_resumes_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(InterruptedTrainingError):
        fine_tune(tiny_model(), examples(), [], settings(), tmp_path, interrupt_at(7))
    done: list[int] = []
    fine_tune(tiny_model(), examples(), [], settings(), tmp_path, lambda event: done.append(event["done"]))
    assert done == [7, 8, 9, 10, 11, 12]  # the checkpoint was that of step 6


def test_checkpoints_are_rare(tmp_path: Path) -> None:
    """At most one a minute: a training of a second writes none."""
    fine_tune(tiny_model(), examples(), [], settings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


def test_seeds_differ(tmp_path: Path) -> None:
    models = [tiny_model() for _ in range(3)]
    for number, (model, seed) in enumerate(zip(models, (0, 0, 10**20), strict=True)):
        fine_tune(model, examples(), [], settings(seed=seed), tmp_path / str(number))
    assert_same(weights(models[0]), weights(models[1]))
    assert not torch.equal(models[0].proj_out.weight, models[2].proj_out.weight)


@pytest.mark.usefixtures("often")
def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    work = tmp_path / "disk"
    work.mkdir()
    size = 200_000  # one checkpoint and a bit: the second finds no room beside the first
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(work)]
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        with pytest.raises(TrainingError) as caught:
            fine_tune(tiny_model(), examples(), [], settings(), work)
        assert "could not be written to" in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert "free some space and run the same command again" in str(caught.value)
        assert sorted(path.name for path in work.iterdir()) == ["checkpoint.safetensors", LOG]
        subprocess.run(["mount", "-o", "remount,size=50m", str(work)], check=True)
        done: list[int] = []
        resumed = tiny_model()
        fine_tune(resumed, examples(), [], settings(), work, lambda event: done.append(event["done"]))
        assert done[0] > 1
        assert len(log_of(work)) == 12
    finally:
        subprocess.run(["umount", str(work)], check=True)
    undisturbed = tiny_model()
    fine_tune(undisturbed, examples(), [], settings(), tmp_path / "large")
    assert_same(weights(resumed), weights(undisturbed))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("often", "one_thread")
def test_kill_9_and_resume_give_the_same_files(tmp_path: Path, whisper_folder: Path) -> None:
    """The whole stage, its child process killed in the middle: every published file has the undisturbed digest."""
    corpus = tmp_path / "corpus"
    for number, split in enumerate(SPLITS):
        rows = [utterance(10 * number + i, 0.5 + 0.3 * i) for i in range(4)]
        candidates = [
            Candidate(u.id, u.text, u.translation, None, lambda u=u: (u.audio(), 16_000))  # type: ignore[misc]
            for u in rows
        ]
        write_split(candidates, corpus / f"{split}.parquet", language="es")
    own = settings(steps=8, batch_seconds=14).model_dump()

    def arguments(name: str) -> dict[str, Any]:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        return {
            "settings": {"language": "es", "task": "translate", **own},
            "inputs": {"train": str(corpus), "validation": str(corpus)},
            "places": {"base": str(whisper_folder)},
            "out": str(out),
            "work": str(tmp_path / f"{name}-work"),
            "threads": 1,
        }

    with Slots(1, threads=1, packages=("finetune_jobs",)) as slots, pytest.raises(StepFailedError, match="SIGKILL"):
        slots.run("finetune_jobs:killed_stage", {**arguments("killed"), "step": 5}, log=tmp_path / "log.txt")
    steps: list[int] = []
    stages.fine_tune(**arguments("killed"), report=lambda event: steps.append(event["done"]))
    assert steps == [5, 6, 7, 8]
    stages.fine_tune(**arguments("undisturbed"), report=lambda event: None)
    found = digests(tmp_path / "killed")
    assert found == digests(tmp_path / "undisturbed")
    assert {"model.safetensors", "config.json", "tokenizer.json", LOG} <= found.keys()
    assert [entry["step"] for entry in log_of(tmp_path / "killed")] == list(range(1, 9))
