from __future__ import annotations

import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lors.blocks import BLOCK, row_blocks
from lors.checkpoint import Checkpoint
from lors.errors import CheckpointError, InputError
from lors.model_writer import model_writer, write_model_folder
from lors.tensor_file import TensorFile


def tensors_of(checkpoint: Checkpoint) -> list[tuple[str, torch.Tensor]]:
    return [(name, checkpoint.tensor(name)) for name in checkpoint.float_names]


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("options", [{}, {"sharded": True, "dtype": torch.bfloat16}, {"tied": False}])
def test_written_folder_is_complete_and_loads(tiny_whisper_folder, tmp_path, options):
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    base = Checkpoint(tiny_whisper_folder(**options))
    out = tmp_path / "deep" / "out"
    wide = ((name, tensor.double()) for name, tensor in tensors_of(base))
    limit = 6000 if options.get("sharded") else 5_000_000_000
    written = write_model_folder(out, base, wide, text="Merged.", provenance={"seed": 7}, max_shard_bytes=limit)
    assert everything_in(out.parent) == ["out"]
    assert len(written.weight_files) == (3 if options.get("sharded") else 1)
    for file in written.weight_files:
        assert file.stat().st_mode == (out / "config.json").stat().st_mode
    side = {path.name for path in base.folder.iterdir() if "safetensors" not in path.name}
    assert side < {*everything_in(out)}
    assert {"README.md", "generation_config.json", "preprocessor_config.json", "merges.txt"} < {*everything_in(out)}
    assert written.names == base.names
    for name in base.names:
        assert written.dtype(name) == base.dtype(name)
        assert torch.equal(written.tensor(name), base.tensor(name))
    card = (out / "README.md").read_text()
    assert "Merged." in card
    assert '"seed": 7' in card
    assert str(tmp_path) not in card
    model = WhisperForConditionalGeneration.from_pretrained(out, dtype="auto")
    assert (model.proj_out.weight is model.model.decoder.embed_tokens.weight) == options.get("tied", True)
    assert WhisperFeatureExtractor.from_pretrained(out).feature_size == 8
    same = tmp_path / "same"
    write_model_folder(same, base, tensors_of(base), text="Merged.", provenance={"seed": 7}, max_shard_bytes=limit)
    assert Checkpoint(same).digest() == written.digest()


def test_buffers_that_are_not_float_come_from_the_base(tensor_folder, tmp_path):
    base = Checkpoint(tensor_folder("base", {"a": torch.ones(2), "steps": torch.arange(3)}))
    written = write_model_folder(tmp_path / "out", base, [("a", torch.full((2,), 5.0))])
    assert written.tensor("a").tolist() == [5, 5]
    assert written.tensor("steps").tolist() == [0, 1, 2]


def test_interrupted_write_leaves_nothing(tiny_whisper_folder, tmp_path):
    base = Checkpoint(tiny_whisper_folder())

    def interrupted():
        yield from tensors_of(base)[:5]
        assert any(path.name.endswith(".partial") for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model_folder(tmp_path / "out", base, interrupted(), max_shard_bytes=4000)
    assert everything_in(tmp_path) == []


def test_refuses_an_output_that_is_not_empty_or_cannot_be_made(tiny_whisper_folder, tmp_path):
    base = Checkpoint(tiny_whisper_folder())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="already there and not empty"):
        write_model_folder(tmp_path / "full", base, tensors_of(base))
    assert everything_in(tmp_path / "full") == ["file"]
    with pytest.raises(InputError, match=r"cannot write .*out"):
        write_model_folder(tmp_path / "full" / "file" / "out", base, tensors_of(base))
    (tmp_path / "empty").mkdir()
    write_model_folder(tmp_path / "empty", base, tensors_of(base))
    for name in ("there", "not-yet"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
    (tmp_path / "there").mkdir()
    for name in ("there", "not-yet"):
        write_model_folder(tmp_path / f"to-{name}", base, tensors_of(base))
        assert "config.json" in everything_in(tmp_path / name)
    assert everything_in(tmp_path) == ["empty", "full", "not-yet", "there", "to-not-yet", "to-there"]
    with pytest.raises(InputError, match="is no name that can be printed"):
        write_model_folder(tmp_path / os.fsdecode(b"m\xff"), base, tensors_of(base))


def test_refuses_values_that_overflow_the_base_dtype(tensor_folder, tmp_path):
    base = Checkpoint(tensor_folder("base", {"a": torch.ones(2, dtype=torch.float16)}))
    with pytest.raises(CheckpointError, match=r"tensor a is not finite as torch.float16"):
        write_model_folder(tmp_path / "out", base, [("a", torch.full((2,), 70000.0))])
    assert everything_in(tmp_path) == ["base"]


def test_rows_may_come_in_any_order_from_any_thread(tensor_folder, tmp_path):
    shapes = {"a": (BLOCK // 64 + 9, 64), "b": (5,), "c": (), "d": (0, 3), "e": (2, 3, 4)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    base = Checkpoint(tensor_folder("base", tensors))
    with model_writer(tmp_path / "out", base, provenance={"seed": 3}) as writer, ThreadPoolExecutor(3) as pool:
        blocks = [(name, start, stop) for name, shape in shapes.items() for start, stop in row_blocks(shape)]
        for done in [
            pool.submit(lambda n, a, b: writer.write(n, a, base.rows(n, a, b)), *block) for block in reversed(blocks)
        ]:
            done.result()
    written = Checkpoint(tmp_path / "out")
    for name, tensor in tensors.items():
        assert torch.equal(written.tensor(name), tensor)
    assert Path(base.folder / "model.safetensors").read_bytes()[8:9] == b"{"


def test_what_is_lost_or_changed_on_the_disk_is_found(tensor_folder, tmp_path):
    base = Checkpoint(tensor_folder("base", {"a": torch.ones(2), "b": torch.zeros(3)}))
    with pytest.raises(AssertionError, match="not all of b was given"), model_writer(tmp_path / "out", base) as writer:
        writer.write("a", 0, torch.ones(2))
    file = TensorFile(tmp_path / "x.safetensors", {"a": (torch.float32, (4,))})
    file.write("a", 0, torch.ones(4))
    with (tmp_path / "x.safetensors").open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"x")
    with pytest.raises(InputError, match="reads back otherwise; check the disk"):
        file.close()
    assert everything_in(tmp_path) == ["base", "x.safetensors"]


def test_a_disk_that_is_full_leaves_nothing(tensor_folder, tmp_path):
    """A limit on a file's size stands for the disk: the kernel answers the write with an error in both cases."""
    base = Checkpoint(tensor_folder("base", {"a": torch.ones(100_000)}))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            InputError, match=r"cannot write .*out \(.*\); choose a place that is writable and has room"
        ):
            write_model_folder(tmp_path / "out", base, tensors_of(base))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert everything_in(tmp_path) == ["base"]
