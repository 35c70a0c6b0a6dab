"""Fine-tuning: what the loop does with each of its settings."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from training_jobs import assert_same, examples, log_of, settings, steps_of, tiny_model, weights

from lors.errors import ConfigError, CorpusError, StepFailedError, TrainingError
from lors.speech.architecture import Whisper
from lors.speech.features import log_mel, pad_mels, window_for, windowed
from lors.training import clock, finetune, modes, update
from lors.training.batches import Draw
from lors.training.distributed import team
from lors.training.examples import Example
from lors.training.finetune import LOG, fine_tune, validation_loss
from lors.training.inputs import Inputs
from lors.training.weights import adamw, trained, update_average


def test_model_sees_what_the_labels_say() -> None:
    """A loss computed by hand from logits of teacher forcing, on a batch with padding in it."""
    model, found = tiny_model(), examples()
    total, tokens = 0.0, 0
    for example in found:
        decoder = torch.tensor([[1, *example.labels[:-1]]])
        seconds = window_for(example.utterance.seconds, 2.0)
        with torch.no_grad(), windowed(model, seconds) as frames:
            features = pad_mels(log_mel([example.utterance.audio()], 80), frames)
            logits = model(input_features=features, decoder_input_ids=decoder).logits[0]
        picked = logits.log_softmax(-1)[range(len(example.labels)), list(example.labels)]
        total -= float(picked.sum())
        tokens += len(example.labels)
    assert validation_loss(model, found, batch_seconds=0.1, window="auto") == pytest.approx(total / tokens, rel=1e-5)
    # A fixed window: then the mean does not depend on the batches, which hold different numbers of tokens.
    losses = [validation_loss(model, found, batch_seconds=seconds, window=2.0) for seconds in (1, 9, 1000)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


# One update


def gradients(model: Any, parts: int, smoothing: float = 0.0) -> tuple[float, dict[str, torch.Tensor]]:
    found = Inputs(examples(), Whisper(), tiny_model().config, "auto")
    batch = found.batch([Draw(index, 0) for index in range(12)], parts)
    with trained(model, (), None, 0) as parameters:
        state = finetune._start(model, parameters, settings(), 1e-3, torch.float32)
        us = team(model.device)
        loss = update.gradient(model.train(), model, batch, state, smoothing, torch.float32, us)
        grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        assert grads.keys() == parameters.keys()
        return loss, grads


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_is_that_of_the_mean_loss_a_token(smoothing: float) -> None:
    model = tiny_model()
    loss, grads = gradients(model, 1, smoothing)
    other = tiny_model().train()
    (part,) = Inputs(examples(), Whisper(), other.config, "auto").batch([Draw(i, 0) for i in range(12)]).parts
    logits = other(**part.inputs).logits
    expected = cross_entropy(logits.flatten(0, 1), part.labels.flatten(), label_smoothing=smoothing)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in other.named_parameters():
        if name in grads:
            assert torch.allclose(grads[name], parameter.grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("parts", [2, 3, 7, 12, 100])
def test_accumulated_parts_give_the_gradient_of_the_batch(parts: int) -> None:
    loss, whole = gradients(tiny_model(), 1)
    same, grads = gradients(tiny_model(), parts)
    assert same == pytest.approx(loss, rel=1e-6)
    for name, gradient in whole.items():
        assert torch.allclose(grads[name], gradient, rtol=1e-4, atol=1e-7), name


def test_activations_computed_twice_give_the_same_gradient() -> None:
    model = tiny_model(dropout=0.1, encoder_layers=2)
    before = model.config.to_dict()
    torch.manual_seed(5)
    _, expected = gradients(model, 3)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for layer in model.model.encoder.layers:
        layer.fc1.register_forward_hook(count)
    torch.manual_seed(5)
    with modes.checkpointed(model):
        _, found = gradients(model, 3)
    assert calls == 2 * 2 * 3
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    gradients(model, 3)
    assert calls == 2 * 2 * 3 + 2 * 3  # off again
    assert model.config.to_dict() == before


def test_weight_decay_is_for_matrices_and_convolutions() -> None:
    model = tiny_model()
    with trained(model, (), None, 0) as parameters:
        matrices, vectors = adamw(parameters, 1e-3, 0.1).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2, 3}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(parameters)


def test_moving_average() -> None:
    parameters = {"x": torch.nn.Parameter(torch.tensor([1.0, 10.0]))}
    averages = {"x": torch.tensor([0.0, 0.0])}
    expected = torch.zeros(2)
    for updates in range(200):
        parameters["x"].data += 1
        update_average(averages, parameters, 0.9, updates)
        decay = min(0.9, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * parameters["x"].detach()
    assert torch.allclose(averages["x"], expected)
    assert expected[0] == pytest.approx(201 - 9, abs=0.01)  # it lags 1 / (1 - decay) behind


# The whole training


def test_learning_rates_of_the_log(tmp_path: Path) -> None:
    result = fine_tune(tiny_model(), examples(), [], settings(warmup=0.25), tmp_path)
    rates = [entry["learning_rate"] for entry in log_of(tmp_path)]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, *(3e-3 * left / 9 for left in range(9, 0, -1))])
    assert result["steps"] == 12
    default = fine_tune(tiny_model(), examples(2), [], settings(learning_rate=None, steps=1), tmp_path / "b")
    assert default["learning_rate"] == 3.75e-5


def test_loss_goes_down(tmp_path: Path) -> None:
    model, found = tiny_model(), examples(4)
    before = validation_loss(model, found, batch_seconds=8, window="auto")
    events: list[Any] = []
    result = fine_tune(model, found, found, settings(steps=60, learning_rate=1e-2), tmp_path, events.append)
    assert result["validation_loss"] < 0.4 * before
    assert [event["done"] for event in events] == list(range(1, 61))
    assert all(event["samples_per_second"] > 0 and event["total"] == 60 for event in events)
    remaining = [event["remaining_seconds"] for event in events]
    assert remaining[-1] == 0 < remaining[30]
    assert [entry["step"] for entry in log_of(tmp_path)] == list(range(1, 61))
    assert 0 < result["input_share"] < 1
    assert result["seconds"] > 0


def test_the_log_is_the_same_for_the_same_training(tmp_path: Path) -> None:
    own = settings(validation={"every": 5, "metric": "loss"})
    for name in ("a", "b"):
        fine_tune(tiny_model(), examples(), examples(3), own, tmp_path / name)
    assert (tmp_path / "a" / LOG).read_bytes() == (tmp_path / "b" / LOG).read_bytes()


def test_accumulation_trains_the_same_model(tmp_path: Path) -> None:
    models = [tiny_model() for _ in range(3)]
    for model, parts in zip(models, (1, 2, 7), strict=True):
        fine_tune(model, examples(), [], settings(accumulate=parts), tmp_path / str(parts))
    losses = [[entry["loss"] for entry in log_of(tmp_path / str(parts))] for parts in (1, 2, 7)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert losses[2] == pytest.approx(losses[0], abs=2e-5)
    for name, tensor in weights(models[0]).items():
        assert torch.allclose(weights(models[1])[name], tensor, atol=1e-4), name
        assert torch.allclose(weights(models[2])[name], tensor, atol=1e-4), name


def test_validation_reads_its_own_audio(tmp_path: Path) -> None:
    """Rows of two splits may have the same id."""
    train = examples(8)
    validation = [Example(replace(e.utterance, id=f"u{i}"), e.labels) for i, e in enumerate(reversed(train))]
    model = tiny_model()
    result = fine_tune(model, train, validation, settings(), tmp_path)
    expected = validation_loss(model, validation, batch_seconds=8, window="auto")
    assert result["validation_loss"] == round(expected, 5)


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (("model.encoder.*", "*.bias"), lambda n, t: n.startswith("model.encoder.") or n.endswith(".bias")),
        (("encoder", "vectors"), lambda n, t: n.startswith("model.encoder.") or t.ndim < 2),
        (("embeddings", "positions"), lambda n, t: "embed_" in n or n == "proj_out.weight"),
    ],
)
def test_freeze_leaves_tensors_as_they_are(tmp_path: Path, freeze: tuple[str, ...], frozen: Any) -> None:
    model = tiny_model()
    before, wanted = weights(model), {name: p.requires_grad for name, p in model.named_parameters()}
    fine_tune(model, examples(), [], settings(freeze=freeze, weight_decay=0.1), tmp_path)
    for name, tensor in weights(model).items():
        still = frozen(name, tensor) or name == "model.encoder.embed_positions.weight"
        assert torch.equal(tensor, before[name]) == still, name
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freeze": ("model.encodr.*",)}, "'model.encodr.*' fits no parameter of the base, such as 'model.encoder."),
        ({"freeze": ("encodr",)}, "'encodr' fits no parameter of the base, such as 'encoder'"),
        ({"freeze": ("*",)}, "leaves nothing to train"),
        ({"freeze": ("encoder", "decoder"), "lora": {}}, "leaves nothing to train"),
        ({"window": 1.0}, "utterance u11 lasts 1.6 s, more than the window of 1 s"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"validation": {"every": 3}}, "nothing computes a score here, set it to loss"),
        ({"validation": {"every": 3, "metric": "loss"}}, "there is no example to validate on"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fine_tune(tiny_model(), examples(), [], settings(**changes), tmp_path)
    assert words in str(caught.value)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no example to train on"):
        fine_tune(tiny_model(), [], examples(2), settings(), tmp_path)


def test_lora_trains_its_targets_alone(tmp_path: Path) -> None:
    model = tiny_model()
    before = weights(model)
    own = settings(lora={"rank": 2, "targets": ["q_proj", "fc1"]}, freeze=("decoder",), learning_rate=3e-2)
    result = fine_tune(model, examples(), examples(3), own, tmp_path)
    after = weights(model)
    assert after.keys() == before.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.encoder.layers.0.{name}.weight" for name in ("self_attn.q_proj", "fc1")}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4) == 2
    merged = validation_loss(model, examples(3), batch_seconds=8, window="auto")
    assert result["validation_loss"] == pytest.approx(merged, abs=1e-4)
    assert steps_of(tmp_path)[-1]["loss"] < steps_of(tmp_path)[0]["loss"]


def tiny_moonshine() -> Any:
    from transformers import MoonshineConfig, MoonshineForConditionalGeneration

    torch.manual_seed(0)
    config = MoonshineConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, encoder_num_hidden_layers=2, decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, max_position_embeddings=48, pad_token_id=2,
    )  # fmt: skip
    return MoonshineForConditionalGeneration(config).eval()


def test_a_moonshine_hears_raw_audio(tmp_path: Path) -> None:
    """Its inputs, windows and start token are its own; parts in one window are the batch here too."""
    models = [tiny_moonshine(), tiny_moonshine()]
    before = validation_loss(models[0], examples(4), batch_seconds=8, window="auto")
    for model, parts in zip(models, (1, 3), strict=True):
        own = settings(
            steps=40, learning_rate=1e-2, accumulate=parts, augment={"speed": [0.9, 1.1]}, gradient_checkpointing=True,
            validation={"every": 20, "metric": "loss"},
        )  # fmt: skip
        result = fine_tune(model, examples(4), examples(4), own, tmp_path / str(parts))
        assert result["validation_loss"] < 0.7 * before
    losses = [[entry["loss"] for entry in steps_of(tmp_path / str(parts))] for parts in (1, 3)]
    assert losses[1][:10] == pytest.approx(losses[0][:10], abs=1e-3)


def test_every_switch_at_once_still_learns(tmp_path: Path) -> None:
    model = tiny_model()
    names, config = list(weights(model)), model.config.to_dict()
    own = settings(
        steps=80, learning_rate=1e-2, schedule="cosine", label_smoothing=0.05, accumulate=2, ema=0.9,
        gradient_checkpointing=True, sampling_temperature=3.0, weight_decay=0.01,
        augment={"speed": [0.95, 1.05], "spec_augment": {"frequency_bins": 4, "time_share": 0.05}},
        validation={"every": 20, "metric": "loss"},
    )  # fmt: skip
    before = validation_loss(model, examples(), batch_seconds=8, window="auto")
    result = fine_tune(model, examples(), examples(), own, tmp_path)
    assert result["validation_loss"] < 0.6 * before
    assert list(weights(model)) == names
    assert model.config.to_dict() == config


# Moving average, selection, early stopping, time


def test_the_average_is_what_is_kept(tmp_path: Path) -> None:
    plain, averaged = tiny_model(), tiny_model()
    seen: list[dict[str, torch.Tensor]] = []
    fine_tune(plain, examples(), [], settings(schedule="constant"), tmp_path / "a")
    own = settings(schedule="constant", ema=0.99, validation={"every": 12})
    fine_tune(
        averaged,
        examples(),
        [],
        own,
        tmp_path / "b",
        score=lambda model: float(len(seen.append(weights(model)) or seen)),
    )
    (scored,) = seen
    assert_same(scored, weights(averaged))
    logs = [steps_of(tmp_path / name) for name in ("a", "b")]
    assert logs[0] == logs[1]  # it does not change the training
    assert not torch.equal(weights(plain)["proj_out.weight"], scored["proj_out.weight"])


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    values = iter([5.0, 3.0, 4.0, 3.0])  # the earlier of equals
    seen: list[dict[str, torch.Tensor]] = []

    def score(model: Any) -> float:
        assert not model.training
        seen.append(weights(model))
        return next(values)

    model, events = tiny_model(), []
    own = settings(validation={"every": 3})
    result = fine_tune(model, examples(), examples(3), own, tmp_path, events.append, score=score)
    assert (result["best_step"], result["best_value"], result["steps"]) == (6, 3.0, 12)
    assert_same(weights(model), seen[1])
    assert not torch.equal(seen[3]["proj_out.weight"], seen[1]["proj_out.weight"])
    expected = [(3, 5.0, 3), (6, 3.0, 6), (9, 4.0, 6), (12, 3.0, 6)]
    lines = [entry for entry in log_of(tmp_path) if "validation_score" in entry]
    assert [(e["step"], e["validation_score"], e["best_step"]) for e in lines] == expected
    told = [event for event in events if "validation_score" in event]
    assert [(e["done"], e["total"], e["validation_score"]) for e in told] == [(s, 12, v) for s, v, _ in expected]
    with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
        assert torch.equal(
            file.get_tensor("model.decoder.layer_norm.weight"), seen[1]["model.decoder.layer_norm.weight"]
        )


def test_what_a_training_starts_from_is_kept_where_no_step_is_better(tmp_path: Path) -> None:
    values, model = iter([3.0, 5.0, 3.0]), tiny_model()
    start, own = weights(model), settings(steps=6, validation={"every": 3, "start": True})
    result = fine_tune(model, examples(), examples(3), own, tmp_path, score=lambda _: next(values))
    assert (result["best_step"], result["best_value"], result["steps"]) == (0, 3.0, 6)
    assert_same(weights(model), start)
    lines = [(e["step"], e["validation_score"]) for e in log_of(tmp_path) if "validation_score" in e]
    assert lines == [(0, 3.0), (3, 5.0), (6, 3.0)]


def test_a_training_killed_while_it_validates_its_start_begins_again(tmp_path: Path) -> None:
    own = settings(steps=3, validation={"every": 3, "start": True})

    def killed(_: Any) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(tiny_model(), examples(), examples(3), own, tmp_path, score=killed)
    (tmp_path / LOG).write_text('{"step": 0, "validation_score": 9.0, "best_step": 0}\n')
    values = iter([2.0, 1.0])
    result = fine_tune(tiny_model(), examples(), examples(3), own, tmp_path, score=lambda _: next(values))
    assert result["best_step"] == 3
    lines = [(e["step"], e["validation_score"]) for e in log_of(tmp_path) if "validation_score" in e]
    assert lines == [(0, 2.0), (3, 1.0)]


def test_patience_ends_the_training(tmp_path: Path) -> None:
    values = iter([5.0, 4.0, 4.5, 4.0, 1.0])
    own = settings(steps=100, validation={"every": 2, "patience": 2})
    result = fine_tune(tiny_model(), examples(), [], own, tmp_path, score=lambda model: next(values))
    assert (result["steps"], result["best_step"], result["best_value"]) == (8, 4, 4.0)
    assert len(steps_of(tmp_path)) == 8


def test_the_last_step_is_validated(tmp_path: Path) -> None:
    own = settings(steps=5, validation={"every": 3, "metric": "loss", "limit": 1})
    model = tiny_model()
    result = fine_tune(model, examples(), examples(6), own, tmp_path)
    lines = [entry for entry in log_of(tmp_path) if "validation_loss" in entry]
    assert [entry["step"] for entry in lines] == [3, 5]
    # The first of each of the three groups.
    expected = validation_loss(model, examples(3), batch_seconds=8, window="auto")
    assert result["best_value"] == pytest.approx(expected, abs=1e-5)


def test_a_time_budget_ends_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: 0.01 * next(ticks)))
    own = settings(steps=100_000, max_hours=1.0 / 3600, warmup=0.00001, validation={"every": 10**6})
    result = fine_tune(tiny_model(), examples(), [], own, tmp_path, score=lambda model: 1.0)
    rates = [entry["learning_rate"] for entry in steps_of(tmp_path)]
    assert 3 < result["steps"] == len(rates) < 1000
    assert 1 <= result["seconds"] < 1.2
    assert rates[0] == pytest.approx(3e-3, rel=0.1)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * rates[0]
    assert log_of(tmp_path)[-1]["step"] == result["best_step"] == result["steps"]  # validated at the end of the time


@pytest.mark.usefixtures("often")
def test_the_time_before_a_resume_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: 0.01 * next(ticks)))
    own, whole, parts = settings(steps=100_000, max_hours=2.0 / 3600), tmp_path / "whole", tmp_path / "parts"
    steps = fine_tune(tiny_model(), examples(), [], own, whole)["steps"]
    first = steps // 2
    with pytest.raises(StepFailedError):
        fine_tune(tiny_model(), examples(), [], own, parts, stop=lambda: len(steps_of(parts)) >= first)
    result = fine_tune(tiny_model(), examples(), [], own, parts)
    assert result["steps"] == pytest.approx(steps, abs=0.1 * steps)
    assert 2 <= result["seconds"] < 2.2
    rates = [entry["learning_rate"] for entry in steps_of(parts)]
    assert rates[first] < 0.7 * max(rates)


# Overflow, not finite, stopping, no room


def test_fp16_updates_that_overflow_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler's part of fp16, on a CPU in float32: the first updates overflow, the others are those of before."""

    def scaler(*_: Any) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)

    monkeypatch.setattr(finetune, "scaler_for", scaler)
    model = tiny_model()
    before: list[dict[str, torch.Tensor]] = []
    own = settings(steps=6, warmup=0.0, schedule="constant", ema=0.5, validation={"every": 1})
    result = fine_tune(
        model, examples(), [], own, tmp_path, score=lambda model: -float(len(before.append(weights(model)) or before))
    )
    assert result["skipped_steps"] == 1
    assert_same(before[0], weights(tiny_model()))
    assert not torch.equal(before[1]["proj_out.weight"], before[0]["proj_out.weight"])
    assert len(steps_of(tmp_path)) == 6


def test_fp16_that_always_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "scaler_for", lambda *_: torch.amp.GradScaler("cpu", init_scale=4.0))
    model = tiny_model()
    model.model.decoder.layers[0].fc1.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"the gradient overflows fp16 at step 7 at any scale"):
        fine_tune(model, examples(), [], settings(), tmp_path)


@pytest.mark.usefixtures("often")
def test_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^the loss became nan at step 2 with learning rate 1e\+38: lower"):
        fine_tune(tiny_model(), examples(), [], settings(learning_rate=1e38, warmup=0, clip=1e9), tmp_path)
    assert [entry["step"] for entry in log_of(tmp_path)] == [1]
    assert [path.name for path in tmp_path.iterdir()] == [LOG]  # weights that are not finite are no checkpoint


def test_weights_that_are_not_finite_at_the_start(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.decoder.layer_norm.weight.data[3] = math.nan
    with pytest.raises(TrainingError, match=r"the loss became nan at step 1 "):
        fine_tune(model, examples(), [], settings(), tmp_path)


def test_a_gradient_that_is_not_finite_leaves_a_checkpoint(tmp_path: Path) -> None:
    """No checkpoint was due: the finite weights of before the bad step are written, and the training goes on there."""
    model = tiny_model()
    calls = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * (math.inf if calls == 5 else 1)

    model.proj_out.weight.register_hook(spoil)
    with pytest.raises(TrainingError, match=r"^the gradient became (inf|nan) at step 5 with learning rate"):
        fine_tune(model, examples(), [], settings(), tmp_path)
    done: list[int] = []
    resumed, undisturbed = tiny_model(), tiny_model()
    fine_tune(resumed, examples(), [], settings(), tmp_path, lambda event: done.append(event["done"]))
    assert done == list(range(5, 13))
    fine_tune(undisturbed, examples(), [], settings(), tmp_path / "undisturbed")
    assert_same(weights(resumed), weights(undisturbed))


def test_a_validation_without_a_number(tmp_path: Path) -> None:
    own = settings(validation={"every": 4})
    with pytest.raises(TrainingError, match=r"the validation at step 4 gave nan"):
        fine_tune(tiny_model(), examples(), [], own, tmp_path, score=lambda model: math.nan)


@pytest.mark.parametrize("step", [1, 6, 12])
def test_stop_writes_a_checkpoint(tmp_path: Path, step: int) -> None:
    asked = iter([False] * (step - 1) + [True])
    with pytest.raises(StepFailedError) as caught:
        fine_tune(tiny_model(), examples(), [], settings(), tmp_path, stop=lambda: next(asked))
    assert f"stopped after step {step} of 12" in str(caught.value)
    assert "run the same command again to go on from there" in str(caught.value)
    done: list[int] = []
    model, undisturbed = tiny_model(), tiny_model()
    fine_tune(model, examples(), [], settings(), tmp_path, lambda event: done.append(event["done"]))
    assert done == list(range(step + 1, 13))
    fine_tune(undisturbed, examples(), [], settings(), tmp_path / "undisturbed")
    assert_same(weights(model), weights(undisturbed))


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


# torch.compile


def test_compiled_layers_train_the_same_model(tmp_path: Path) -> None:
    """One program for each kind of layer, whatever the window and the length of the labels; the names stay."""
    plain, compiled = tiny_model(encoder_layers=2), tiny_model(encoder_layers=2)
    try:
        modes._try_compiler(plain.device)
    except ConfigError:
        pytest.skip("torch.compile needs a C++ compiler")
    fine_tune(plain, examples(), [], settings(steps=8), tmp_path / "plain")
    torch.compiler.reset()
    counters.clear()
    own = settings(steps=8, compile=True, validation={"every": 3, "metric": "loss"})
    fine_tune(compiled, examples(), examples(3), own, tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == 1 + 2  # the first one is that of the trial
    assert weights(compiled).keys() == weights(plain).keys()
    losses = [[entry["loss"] for entry in steps_of(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert all(layer._compiled_call_impl is None for layer in modes._layers(compiled))


def test_compile_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "fx_graph_cache", False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"torch.compile does not work here .*install a C\+\+ compiler"):
        fine_tune(tiny_model(), examples(), [], settings(compile=True), tmp_path)
