from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lors.blocks import row_blocks
from lors.checkpoint import Checkpoint
from lors.groups import GROUPS, in_group, overrides, unmatched


def test_named_groups_of_a_real_whisper(tiny_whisper_folder):
    model = Checkpoint(tiny_whisper_folder(tied=False))
    members = {
        group: {name for name in model.names if in_group(group, name, model.shape(name))}
        for group in (*GROUPS, "*.fc1.*")
    }
    assert members["encoder"] | members["decoder"] | {"proj_out.weight"} == {*model.names}
    assert not members["encoder"] & members["decoder"]
    assert "model.decoder.layers.0.encoder_attn.q_proj.weight" in members["decoder"]
    assert members["embeddings"] == {"model.decoder.embed_tokens.weight", "proj_out.weight"}
    assert members["positions"] == {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")}
    assert members["convolutions"] == {"model.encoder.conv1.weight", "model.encoder.conv2.weight"}
    assert members["vectors"] == {name for name in model.names if len(model.shape(name)) == 1}
    assert len(members["*.fc1.*"]) == 4


def test_a_later_group_wins():
    groups = {"encoder": {"a": 1, "b": 1}, "*.fc1.*": {"b": 2}}
    assert overrides(groups, "model.encoder.fc1.weight", (2, 2)) == {"a": 1, "b": 2}
    assert overrides(dict(reversed(groups.items())), "model.encoder.fc1.weight", (2, 2)) == {"a": 1, "b": 1}
    assert overrides(groups, "model.decoder.fc2.weight", (2, 2)) == {}
    assert unmatched(["encoder", "*.fc9.*"], {"model.encoder.fc1.weight": (2, 2)}) == ["*.fc9.*"]


@given(st.lists(st.integers(0, 40), max_size=4), st.integers(1, 100))
def test_row_blocks_cover_each_row_once(shape, size):
    blocks = row_blocks(tuple(shape), size)
    rows = [row for start, stop in blocks for row in range(start, stop)]
    entries = 1
    for side in shape:
        entries *= side
    assert rows == (list(range(shape[0] if shape else 1)) if entries else [])
    width = entries // shape[0] if shape and shape[0] else 1
    assert all((stop - start) * width <= size or stop - start == 1 for start, stop in blocks)


@pytest.mark.parametrize(("shape", "blocks"), [((), [(0, 1)]), ((0, 3), []), ((5, 2), [(0, 2), (2, 4), (4, 5)])])
def test_row_blocks_examples(shape, blocks):
    assert row_blocks(shape, 4) == blocks
