from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from lors.checkpoint import HEAD, Checkpoint, check_compatible, is_finite
from lors.errors import CheckpointError
from lors.files import SETTLED_NS


def tensors_of(checkpoint: Checkpoint) -> list[tuple[str, torch.Tensor]]:
    return [(name, checkpoint.tensor(name)) for name in checkpoint.float_names]


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_reads_what_transformers_wrote(tiny_whisper_folder):
    from transformers import WhisperForConditionalGeneration

    folder = tiny_whisper_folder(dtype=torch.bfloat16)
    checkpoint = Checkpoint(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype="auto")
    parameters = dict(model.named_parameters())  # a tied parameter once
    assert checkpoint.names == tuple(sorted(parameters))
    assert checkpoint.parameters == sum(tensor.numel() for tensor in parameters.values())
    for name, tensor in parameters.items():
        assert checkpoint.dtype(name) == torch.bfloat16
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_sharded_equals_single(tiny_whisper_folder):
    single, sharded = Checkpoint(tiny_whisper_folder(3)), Checkpoint(tiny_whisper_folder(3, sharded=True))
    assert len(sharded.weight_files) > 1
    check_compatible(single, sharded)
    for name in single.names:
        assert torch.equal(single.tensor(name), sharded.tensor(name))


def test_untied_head_is_kept_and_a_stored_tied_one_is_not(tiny_whisper_folder):
    assert HEAD in Checkpoint(tiny_whisper_folder(tied=False)).names
    folder = tiny_whisper_folder()
    absent = Checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    weights[HEAD] = weights["model.decoder.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stored = Checkpoint(folder)
    assert HEAD not in absent.names
    assert stored.names == absent.names
    assert stored.parameters == absent.parameters
    weights[HEAD][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert HEAD in Checkpoint(folder).names


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"pickled weights only.*AutoModelForSpeechSeq2Seq.from_pretrained\(SOURCE\).save_pretrained",
        ),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "corrupt or cut off"),
        (lambda folder: os.truncate(folder / "model.safetensors", 4), "corrupt or cut off"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 900), "corrupt or cut off"),
    ],
)
def test_refuses_a_damaged_folder_in_one_sentence(tiny_whisper_folder, damage, message):
    folder = tiny_whisper_folder()
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_incomplete_shards(tiny_whisper_folder):
    folder = tiny_whisper_folder(sharded=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["invented"] = next(iter(index["weight_map"].values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks the tensor invented"):
        Checkpoint(folder)
    del index["weight_map"]["invented"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.rename(folder / "away")
    with pytest.raises(CheckpointError, match=f"lacks the shard {shard.name}"):
        Checkpoint(folder)
    index["weight_map"]["invented"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks the shard ../elsewhere.safetensors"):
        Checkpoint(folder)


def test_hub_id_comes_from_the_cache_when_offline(tiny_whisper_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="somebody/whisper-tiny is neither a folder nor a Hugging Face model"):
        Checkpoint("somebody/whisper-tiny")
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--somebody--whisper-tiny" / "snapshots" / commit
    shutil.copytree(tiny_whisper_folder(), snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    checkpoint = Checkpoint("somebody/whisper-tiny")
    assert checkpoint.folder == snapshot
    assert checkpoint.label == checkpoint.hub_id == "somebody/whisper-tiny"


def test_what_cannot_be_a_hub_id_is_not_looked_up(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint(tmp_path / "nowhere")


def test_digest_follows_content_and_the_memo_spares_reading(tiny_whisper_folder):
    folder, other = tiny_whisper_folder(1), tiny_whisper_folder(1)
    memo: dict[str, str] = {}
    time.sleep(2 * SETTLED_NS / 1e9)  # a file younger than that is not memoised
    digest = Checkpoint(folder).digest(memo)
    assert digest == Checkpoint(other).digest()
    assert len(memo) == 2
    known = dict(memo)
    memo = {path: f"{line.rpartition(' ')[0]} known" for path, line in memo.items()}
    assert Checkpoint(folder).digest(memo) != digest
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    assert Checkpoint(folder).digest(known) not in {digest, Checkpoint(tiny_whisper_folder(2)).digest()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_check_finite_names_the_tensor(tensor_folder, value, dtype):
    good, bad = torch.ones(3, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    bad[1, 2] = value
    Checkpoint(tensor_folder("good", {"a": good, "empty": torch.empty(0, 3, dtype=dtype)})).check_finite()
    assert not is_finite(bad)
    with pytest.raises(CheckpointError, match="bad: the tensor b holds NaN or infinity"):
        Checkpoint(tensor_folder("bad", {"a": good, "b": bad})).check_finite()


def test_compatible_names_tensor_and_both_shapes(tiny_whisper_folder, tensor_folder):
    base = Checkpoint(tiny_whisper_folder())
    check_compatible(base, Checkpoint(tiny_whisper_folder(1, dtype=torch.float16)))
    with pytest.raises(CheckpointError, match=r"embed_positions.weight is \[16, 24\] in .* but \[16, 16\] in"):
        check_compatible(base, Checkpoint(tiny_whisper_folder(d_model=24)))
    with pytest.raises(CheckpointError, match=r"proj_out.weight is \[64, 16\] in .* but absent in"):
        check_compatible(base, Checkpoint(tiny_whisper_folder(tied=False)))
    with pytest.raises(CheckpointError, match=r"proj_out.weight is absent in .* but \[64, 16\] in"):
        check_compatible(Checkpoint(tiny_whisper_folder(tied=False)), base)
    one = tensor_folder("one", {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"another architecture .*model_type bart, not whisper"):
        check_compatible(
            Checkpoint(one), Checkpoint(tensor_folder("two", {"a": torch.ones(2)}, {"model_type": "bart"}))
        )
    with pytest.raises(CheckpointError, match=r"the tensor a is torch.int64 in three but torch.float32 in one"):
        check_compatible(Checkpoint(one), Checkpoint(tensor_folder("three", {"a": torch.ones(2, dtype=torch.int64)})))
