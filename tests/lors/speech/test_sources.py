from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from speech_sounds import sound

from lors.errors import ConfigError, CorpusError
from lors.speech.corpora.manifest import rows_to_read
from lors.speech.corpora.settings import ManifestCorpora, SyntheticCorpora
from lors.speech.corpora.sources import SplitSource, candidates, describe
from lors.speech.corpus import read_split, write_split


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", sound(0.5, seed=number), 16000)
    for split in ("train", "test"):
        rows = [{"path": f"{number}.wav", "text": f"hola {number}"} for number in range(4)]
        (tmp_path / f"es-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def described(folder: Path, split: str = "train", **own: Any) -> SplitSource:
    data = {"source": "manifest", "path": f"{folder}/{{language}}-{{split}}.jsonl", "columns": {"audio": "path"}, **own}
    return describe(ManifestCorpora.model_validate(data), "es", split)


def test_a_manifest_through_the_door(manifests: Path) -> None:
    source = described(manifests, limits={"train": 3}, hours={"test": 1})
    assert source.settings == {"columns": {"audio": "path"}, "limit": 3, "hours": None}
    assert source.places == {"manifest": str(manifests / "es-train.jsonl")}
    assert described(manifests, "test", hours={"test": 1}).settings["hours"] == 1
    settings = {"source": "manifest", "language": "es", "split": "train", **source.settings}
    write_split(candidates(settings, source.places), manifests / "out/train.parquet", language="es", limit=3)
    assert [u.text for u in read_split(manifests / "out/train.parquet")] == ["hola 0", "hola 1", "hola 2"]
    with pytest.raises(CorpusError, match=r"es-validation\.jsonl does not exist"):
        described(manifests, "validation")
    with pytest.raises(CorpusError, match="no column 'words' for the text"):
        described(manifests, columns={"audio": "path", "text": "words"})


def test_rows_after_the_limit_do_not_count(manifests: Path) -> None:
    # A share of one quarter may be bad, so that the first row needs at most 1 / 0.75 rows, and one for the rounding.
    first = described(manifests, limits={"train": 1}, max_rejected=0.25).outside
    (manifests / "3.wav").write_bytes(b"other")
    assert described(manifests, limits={"train": 1}, max_rejected=0.25).outside == first
    (manifests / "1.wav").write_bytes(b"other")
    assert described(manifests, limits={"train": 1}, max_rejected=0.25).outside != first


@given(
    bad=st.lists(st.booleans(), min_size=1, max_size=40),
    limit=st.integers(1, 20),
    max_rejected=st.floats(0, 1),
)
def test_a_preparation_that_succeeds_reads_no_more_rows_than_are_hashed(
    bad: list[bool], limit: int, max_rejected: float
) -> None:
    read = valid = 0
    for is_bad in bad:
        read, valid = read + 1, valid + (not is_bad)
        if valid == limit:
            break
    count = rows_to_read(limit, max_rejected)
    if valid == limit and read - valid <= max_rejected * read:  # as `write_split` says
        assert count is None or read <= count
    assert rows_to_read(None, max_rejected) is None


def test_the_synthetic_corpus_through_the_door() -> None:
    corpora = SyntheticCorpora.model_validate({"source": "synthetic", "seed": 3, "utterances": {"test": 2}})
    source = describe(corpora, "es", "test")
    assert (source.settings, source.places) == ({"limit": 2, "seed": 3}, {})
    assert sorted(source.outside) == ["babel", "espeakng-loader", "num2words"]
    settings = {"source": "synthetic", "language": "es", "split": "test", **source.settings}
    assert [c.id for c in candidates(settings, source.places)] == ["test-00000", "test-00001"]
    with pytest.raises(ConfigError, match="the synthetic corpus does not speak 'ja', choose from ca, de"):
        describe(corpora, "ja", "test")


def test_the_door_is_light() -> None:
    code = "import sys, lors.speech.corpora.sources as _; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "huggingface_hub", "pandas", "prefect"} & set(loaded)
