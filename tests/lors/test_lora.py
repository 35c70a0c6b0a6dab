from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lors.checkpoint import Checkpoint
from lors.delta_file import write
from lors.errors import CheckpointError, InputError
from lors.lora import export_lora
from lors.prune import PruneSettings, prune_task_vector


def compact(base, path, composition="additive", dtype="float32", **options):
    """A pruned task vector of random deltas, large enough to move the logits."""
    rng = np.random.default_rng(0)
    deltas = {
        name: torch.from_numpy(rng.normal(0, 0.1, base.shape(name)).astype(np.float32)) for name in base.float_names
    }
    settings = PruneSettings(composition=composition, rank_ratio=0.3, **options)
    pruned = prune_task_vector(deltas.items(), settings, dtype)
    return write(path, pruned, base_digest=base.digest(), settings=settings)


def logits(model):
    torch.manual_seed(0)
    features, tokens = torch.randn(2, 8, 40), torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        return model.eval()(input_features=features, decoder_input_ids=tokens).logits


@pytest.mark.parametrize(("tied", "dtype", "scaling"), [(True, "float32", 1.0), (False, "int8", 0.4)])
def test_peft_gives_the_logits_of_base_plus_low_rank_part(tiny_whisper_folder, tmp_path, tied, dtype, scaling):
    from peft import PeftModel
    from transformers import WhisperForConditionalGeneration

    folder = tiny_whisper_folder(tied=tied)
    base = Checkpoint(folder)
    file = compact(base, tmp_path / "es.safetensors", dtype=dtype)
    export = export_lora(base, file, tmp_path / "adapter", scaling)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = WhisperForConditionalGeneration.from_pretrained(folder)
    before = logits(plain)
    adapted = PeftModel.from_pretrained(WhisperForConditionalGeneration.from_pretrained(folder), tmp_path / "adapter")
    modules = dict(plain.named_modules())
    assert {"model.encoder.layers.0.fc1", "model.decoder.embed_tokens", "proj_out"} < export.modules.keys()
    with torch.no_grad():
        for module in export.modules.keys() - ({"proj_out"} if tied else set()):
            us, vh = file.parts(f"{module}.weight").factors()
            weight = modules[module].weight
            weight += scaling * (us @ vh).reshape(weight.shape)
    expected = logits(plain)
    assert (expected - before).abs().max() > 0.1
    assert torch.allclose(logits(adapted), expected, atol=1e-5)


def test_says_what_is_left_out(tiny_whisper_folder, tmp_path):
    base = Checkpoint(tiny_whisper_folder())
    low = compact(base, tmp_path / "low.safetensors", "low_rank", vectors="drop")
    export = export_lora(base, low, tmp_path / "low")
    assert export.left_out == (
        "model.decoder.embed_positions.weight",
        "model.encoder.conv1.weight",
        "model.encoder.conv2.weight",
        "model.encoder.embed_positions.weight",
    )
    assert "- `model.decoder.embed_positions.weight`" in (tmp_path / "low" / "README.md").read_text()
    additive = compact(base, tmp_path / "additive.safetensors")
    assert set(export_lora(base, additive, tmp_path / "additive").left_out) == {*base.names}
    config = json.loads((tmp_path / "low" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == export.modules
    assert export.bytes > 0
    untied = Checkpoint(tiny_whisper_folder(tied=False))
    export_lora(untied, compact(untied, tmp_path / "untied.safetensors"), tmp_path / "untied")
    told = ["merge_and_unload" in (tmp_path / name / "README.md").read_text() for name in ("additive", "untied")]
    assert told == [True, False]


@pytest.mark.parametrize("composition", ["sparse", "sequential"])
def test_refuses_a_file_without_a_low_rank_part(tiny_whisper_folder, tmp_path, composition):
    base = Checkpoint(tiny_whisper_folder())
    file = compact(base, tmp_path / "es.safetensors", composition)
    with pytest.raises(CheckpointError, match=r"es.safetensors has no low-rank part"):
        export_lora(base, file, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_refuses_another_base_a_full_folder_and_a_scaling_that_is_no_number(tiny_whisper_folder, tmp_path):
    base = Checkpoint(tiny_whisper_folder())
    file = compact(base, tmp_path / "es.safetensors")
    with pytest.raises(CheckpointError, match="another base"):
        export_lora(Checkpoint(tiny_whisper_folder(1)), file, tmp_path / "adapter")
    with pytest.raises(InputError, match="scaling coefficient is nan"):
        export_lora(base, file, tmp_path / "adapter", float("nan"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes").touch()
    with pytest.raises(InputError, match="already there"):
        export_lora(base, file, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "es.safetensors"]
