from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from speech_sounds import utterance
from transformers import (
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from lors.errors import ConfigError, InputError
from lors.speech.architecture import architecture_of
from lors.training.lora import add_lora, merge_lora
from lors.training.settings import Lora

AUDIOS = [utterance(number, 0.5 + 0.2 * number).audio() for number in range(3)]
LABELS = torch.tensor([[3, 4, 5, 0], [6, 7, 0, -100], [8, 0, -100, -100]])


def whisper() -> Any:
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=30, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_target_positions=20,
            max_source_positions=200, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
        )
    )  # fmt: skip


def moonshine() -> Any:
    torch.manual_seed(0)
    return MoonshineForConditionalGeneration(
        MoonshineConfig(
            vocab_size=30, hidden_size=16, intermediate_size=32, encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=1, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
            max_position_embeddings=20, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
        )
    )  # fmt: skip


def loss_of(model: Any) -> torch.Tensor:
    """In a window shorter than the encoder's own."""
    architecture = architecture_of(model)
    inputs = architecture.collate(model.config, architecture.features(model.config, AUDIOS), 1.0)
    with architecture.windowed(model, 1.0):
        loss: torch.Tensor = model(**inputs, labels=LABELS, use_cache=False).loss
    return loss


def trained(model: Any, steps: int = 3) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model.train())
        loss.backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def factors(model: Any) -> dict[str, torch.Tensor]:
    """B @ A by the name of the weight that gets it."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {
        name.replace("lora_A.default.", ""): state[name.replace("lora_A", "lora_B")] @ tensor
        for name, tensor in state.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("fc1", "decoder.layers.0.encoder_attn.k_proj")])
@pytest.mark.parametrize("make", [whisper, moonshine])
def test_expert_minus_base_is_exactly_the_update_and_zero_elsewhere(
    make: Callable[[], Any], targets: Sequence[str]
) -> None:
    base, model = make().state_dict(), make()
    names, attributes = list(base), set(vars(model))
    tied = model.get_output_embeddings().weight
    settings = Lora(rank=3, alpha=5.0, targets=tuple(targets))
    assert add_lora(model, settings, seed=0) is model
    losses = trained(model)
    assert losses[-1] < losses[0]
    updates = factors(model)
    assert updates
    assert all(name.removesuffix(".weight").endswith(tuple(targets)) for name in updates)
    assert merge_lora(model) is model
    after = model.state_dict()
    assert list(after) == names
    assert set(vars(model)) == attributes
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is tied
    for name in names:
        if name in updates:
            assert torch.equal(after[name], base[name] + updates[name] * (5.0 / 3))
            delta = after[name].double() - base[name].double()
            assert torch.allclose(delta, updates[name].double() * (5.0 / 3), rtol=0, atol=2e-7)
            singular = torch.linalg.svdvals(delta)
            assert float(singular[2]) > 2e-5 > 2e-6 > float(singular[3])
        else:
            assert torch.equal(after[name].view(torch.int32), base[name].view(torch.int32))


def test_an_untrained_update_changes_nothing() -> None:
    base, model = whisper().eval(), add_lora(whisper().eval(), Lora(), seed=0)
    assert torch.equal(loss_of(model), loss_of(base))
    merged = merge_lora(model).state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in base.state_dict().items())


def test_merging_gives_what_the_updates_computed() -> None:
    model = add_lora(whisper(), Lora(rank=4), seed=0)
    trained(model)
    with torch.no_grad():
        before = float(loss_of(model.eval()))
        assert abs(before - float(loss_of(whisper().eval()))) > 0.05
        assert float(loss_of(merge_lora(model))) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("make", [whisper, moonshine])
def test_gradient_checkpointing_gives_the_same_training(make: Callable[[], Any]) -> None:
    runs = []
    for checkpointing in (False, True):
        model = add_lora(make(), Lora(rank=2), seed=0)
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        losses = trained(model)
        runs.append((losses, merge_lora(model).state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())


def test_the_updates_come_from_the_seed_alone_and_random_numbers_go_on_as_before() -> None:
    def drawn(seed: int) -> bytes:
        model = whisper()
        states = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
        add_lora(model, Lora(), seed)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1].tobytes(), random.getstate()) == states[1:]
        return b"".join(p.detach().numpy().tobytes() for n, p in model.named_parameters() if "lora_A" in n)

    first = drawn(0)
    torch.manual_seed(99)
    assert drawn(0) == first != drawn(1)


def test_only_the_updates_are_trainable_and_dropout_works_on_them() -> None:
    model = add_lora(whisper(), Lora(rank=2, dropout=0.5), seed=0)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * 4  # A and B of two targets in four attentions
    assert all(".lora_" in name for name in trainable)
    trained(model, 1)
    with torch.no_grad():
        assert len({float(loss_of(model.train())) for _ in range(4)}) == 4


@pytest.mark.parametrize(
    ("targets", "wrong"),
    [
        (("q_proj", "qproj"), "qproj"),
        (("proj",), "proj"),  # an end of a name is whole words
        (("proj_out",), "proj_out"),  # tied to the embeddings
        (("embed_tokens",), "embed_tokens"),
        (("conv1",), "conv1"),
    ],
)
def test_targets_that_fit_nothing(targets: tuple[str, ...], wrong: str) -> None:
    model = whisper()
    names = list(model.state_dict())
    with pytest.raises(ConfigError, match=f"'{wrong}' .*has fc1, fc2, k_proj, out_proj, q_proj, v_proj$"):
        add_lora(model, Lora(targets=targets), seed=0)
    assert list(model.state_dict()) == names


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'lors\[lora\]'"):
        add_lora(whisper(), Lora(), seed=0)
