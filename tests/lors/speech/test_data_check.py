"""`check` on corpora with every defect planted, on one without any, and the figures it is made of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from speech_sounds import sound

from lors.config import Experiment, parse_experiment
from lors.errors import CheckpointError, ConfigError
from lors.pipeline import build_steps
from lors.speech.architecture import architecture_of
from lors.speech.corpus import SAMPLE_RATE, Candidate, read_split, write_split
from lors.speech.data_check import DataReport, check
from lors.speech.data_check_page import page
from lors.speech.data_facts import Cases, Distribution, misfits, order_correlation, sample_audio
from lors.speech.data_findings import SEVERITIES
from lors.speech.scripts import is_foreign, script
from lors.steps import plan
from lors.store import Store
from lors.training.examples import examples_for

RATE = 15.0  # characters a second of the sentences here


def words(seed: int, count: int = 5) -> str:
    """Different for each seed, all letters that every tokenizer here can write."""
    letters = np.random.default_rng(seed)
    return " ".join("".join(letters.choice(list("aeioulmnrst"), int(letters.integers(3, 9)))) for _ in range(count))


def row(split: str, number: int, **changes: Any) -> dict[str, Any]:
    """An utterance without a fault: its own sentence, translation and speaker."""
    seed = {"train": 0, "validation": 1000, "test": 2000}[split] + number
    text = words(seed, 2 + number % 5)
    plain = {"id": f"{split}-{number}", "text": text, "translation": words(seed + 5000), "speaker": f"{split}-{seed}"}
    return {**plain, "audio": sound(len(text) / RATE, seed=number % 7), **changes}


def rows(split: str, count: int, **changes: dict[str, Any]) -> list[dict[str, Any]]:
    """`changes` by the number of the row, as in `r3={"text": ..}`."""
    return [row(split, number, **changes.get(f"r{number}", {})) for number in range(count)]


def manifest(folder: Path, language: str, split: str, found: list[dict[str, Any]]) -> None:
    """Write the rows, and their audio as WAV."""
    (folder / language).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, fields in enumerate(found):
        path = folder / language / f"{split}-{number}.wav"
        soundfile.write(path, fields["audio"], SAMPLE_RATE, subtype="PCM_16")
        lines.append(json.dumps({**fields, "audio": path.name}))
    (folder / language / f"{split}.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="session")
def base(whisper_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Whisper with a tokenizer that has no second byte of ñ, and a decoder of 128 tokens."""
    from tokenizers import pre_tokenizers
    from transformers import WhisperTokenizer

    folder = tmp_path_factory.mktemp("base") / "whisper"
    shutil.copytree(whisper_folder, folder)
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"±"})
    known = list(json.loads((folder / "generation_config.json").read_text())["lang_to_id"])
    tokenizer = WhisperTokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    names = ["<|startoftranscript|>", *known, "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    for old in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / old).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


Make = Callable[..., Experiment]


@pytest.fixture(scope="session")
def make(base: Path) -> Make:
    def experiment(folder: Path, **changes: Any) -> Experiment:
        settings: dict[str, Any] = {
            "base": str(base),
            "languages": ["es"],
            "corpora": {"source": "manifest", "path": str(folder / "{language}" / "{split}.jsonl")},
            "resources": {"parallel": 1, "threads": 1},
            "output": str(folder / "out"),
            "store": str(folder / "store"),
        }
        return parse_experiment(settings | changes)

    return experiment


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory, make: Make) -> Experiment:
    folder = tmp_path_factory.mktemp("clean")
    for split, count in (("train", 60), ("validation", 6), ("test", 8)):
        manifest(folder, "es", split, rows(split, count))
    return make(folder)


SHARED = "Hola, mundo de todos."
LONG = words(77, 30)


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory, make: Make) -> Experiment:
    """Spanish with every defect, French that cannot be prepared in two splits, Cantonese as a guard."""
    folder = tmp_path_factory.mktemp("planted")
    loud = np.sign(sound(2.0)).astype(np.float32)
    train = rows(
        "train",
        60,
        r0={"text": SHARED, "speaker": "shared", "translation": "Hello, all of the world."},
        r1={"text": "el niño y la niña", "audio": sound(1.2)},
        r2={"text": LONG, "audio": sound(len(LONG) / RATE)},
        r3={"text": "ya", "audio": sound(7.0)},
        r4={"text": words(78, 8), "audio": sound(0.5)},
        r5={"text": "\u0430qu\u00ed est\u0430\u0301"},  # Cyrillic a
        r6={"translation": None, "speaker": None},
        r7={"audio": loud},
        r8={"audio": sound(2.0) * 0.01},
        r9={"audio": np.zeros(SAMPLE_RATE, np.float32)},
        r10={"text": "un aÃ±o mÃ¡s"},
        r11={"text": SHARED.upper()},
    )
    test = rows(
        "test",
        8,
        r0={"text": "hola mundo de todos", "speaker": "shared"},
        r1={"translation": "hello all of the world"},
    )
    manifest(folder, "es", "train", train)
    manifest(folder, "es", "validation", rows("validation", 6, r0={"translation": "hello all of the world"}))
    manifest(folder, "es", "test", test)
    manifest(folder, "fr", "train", rows("train", 5, r1={"text": "…"}, r2={"text": "!"}))
    manifest(folder, "fr", "test", rows("test", 5, r2={"translation": "Hello all of the world"}))
    manifest(folder, "yue", "test", [row("test", n, text="今日天氣好" * 2, translation=None) for n in range(3)])
    return make(
        folder,
        languages=["es", "fr"],
        evaluate={"guard": ["yue"], "window": 30},
        finetune={"window": 9},
    )


@pytest.fixture(scope="session")
def report(planted: Experiment) -> DataReport:
    return check(planted)


@pytest.fixture
def say(report: DataReport) -> Callable[..., str]:
    """The one finding about something, as `severity: sentence`."""

    def find(about: str, language: str, split: str) -> str:
        found = [f for f in report.findings if (f.about, f.language, f.split) == (about, language, split)]
        assert len(found) == 1, f"{about} of {language} {split}: {found}"
        return f"{found[0].severity}: {found[0].sentence}"

    return find


def facts(report: DataReport, language: str, split: str) -> Any:
    return next(f for f in report.splits if (f.language, f.split) == (language, split))


def test_a_clean_corpus_has_nothing_to_say(clean: Experiment) -> None:
    report = check(clean)
    assert report.findings == ()
    assert not report.failed
    assert [(f.split, f.utterances, f.speakers) for f in report.splits] == [
        ("train", 60, 60), ("validation", 6, 6), ("test", 8, 8),
    ]  # fmt: skip
    train = facts(report, "es", "train")
    assert train.correlation > 0.95
    assert train.characters_per_second.median == pytest.approx(RATE, rel=0.05)
    assert train.hours == pytest.approx(sum(len(words(n, 2 + n % 5)) for n in range(60)) / RATE / 3600, abs=1e-3)
    assert sum(train.seconds.counts) == sum(train.words_per_second.counts) == 60


def test_the_run_finds_the_prepared_splits_in_the_store(clean: Experiment) -> None:
    check(clean)
    store = Store(clean.store)
    planned = [p for p in plan(build_steps(clean, store), store) if p.step.stage == "prepare_split"]
    assert len(planned) == 3
    assert all(p.cached for p in planned)


def test_progress_names_each_step_once(clean: Experiment) -> None:
    check(clean)
    told, counts = [], []

    class Listening:
        def __init__(self, steps: int, cached: int) -> None:
            counts.append((steps, cached))

        def __enter__(self) -> Any:
            return lambda step, event: told.append((step, event))

        def __exit__(self, *_: object) -> None: ...

    check(clean, Listening)
    assert counts == [(6, 3)]
    assert [step for step, event in told if "finished" in event] == [
        f"examine es {split}" for split in ("train", "validation", "test")
    ]


def test_one_failed_split_does_not_hide_the_others(report: DataReport, say: Callable[..., str]) -> None:
    assert [(f.language, f.split) for f in report.splits] == [
        ("es", "train"), ("es", "validation"), ("es", "test"), ("fr", "test"), ("yue", "test"),
    ]  # fmt: skip
    assert report.failed
    sentence = say("preparation", "fr", "train")
    assert sentence.startswith("error: the split cannot be prepared: 2 of 5 rows of the train split of fr are bad")
    assert "text without letters (2)" in sentence
    assert {f.split for f in report.findings if f.language == "yue"} == {"test"}  # a guard needs no other split
    assert "fr/validation.jsonl does not exist" in say("preparation", "fr", "validation")
    order = [(SEVERITIES.index(f.severity), ("es", "fr", "yue").index(f.language)) for f in report.findings]
    assert order == sorted(order)
    assert [f.split for f in report.findings if f.language == "fr"] == ["train", "validation", "test"]


def test_texts_that_cannot_belong_to_their_audio(report: DataReport, say: Callable[..., str]) -> None:
    sentence = say("misfits", "es", "train")
    assert sentence.startswith("warning: 2 of 58 utterances (3.4%) have a text that cannot belong to the audio")
    assert "listen to train-3, train-4," in sentence
    worst = facts(report, "es", "train").worst_misfits
    assert [(m.id, m.seconds, m.text) for m in worst] == [("train-3", 7.0, "ya"), ("train-4", 0.5, words(78, 8))]
    assert worst[1].usual == pytest.approx(len(words(78, 8)) / RATE, rel=0.05)


def test_what_splits_have_in_common(report: DataReport, say: Callable[..., str]) -> None:
    sentence = say("overlap", "es", "validation")
    assert sentence.startswith("note: 1 utterance (16.7%) has 1 translation that train has too")
    found = {(o.language, o.split, o.other, o.about): (o.shared, o.utterances) for o in report.overlaps}
    assert found == {
        ("es", "test", "train", "speakers"): (1, 1),
        ("es", "test", "train", "sentences"): (1, 1),
        ("es", "test", "train", "translations"): (1, 1),
        ("es", "test", "validation", "translations"): (1, 1),
        ("es", "validation", "train", "translations"): (1, 1),
        ("fr", "test", "es train", "translations"): (1, 1),
    }
    tested = [f.sentence for f in report.findings if (f.about, f.severity, f.split) == ("overlap", "warning", "test")]
    assert len(tested) == 2
    assert "has 1 speaker and 1 utterance (12.5%) has 1 sentence and 1 utterance (12.5%) has 1 translation" in tested[0]
    assert "that train has too (“shared”), so the scores say too much about new speakers" in tested[0]
    assert "that es train has too (“hello all of the world”)" in tested[1]


def test_what_the_tokenizer_cannot_write(report: DataReport, say: Callable[..., str]) -> None:
    assert say("tokenizer", "es", "train") == (
        "warning: 1 of 58 utterances (1.7%) has a text that the base's tokenizer cannot write, because it lacks "
        "ñ U+00F1 2 times (see train-1): replace those characters in the texts, or take a base that has them"
    )
    assert facts(report, "es", "train").unwritten == Cases(1, ("train-1",))


def test_letters_of_another_script(report: DataReport, say: Callable[..., str]) -> None:
    sentence = say("script", "es", "train")
    assert sentence.startswith("warning: 1 of 58 utterances (1.7%) has letters of another script")
    assert "а U+0430 2 times; see train-5" in sentence
    assert facts(report, "yue", "test").foreign.count == 0


def test_targets_that_are_too_long(report: DataReport, say: Callable[..., str]) -> None:
    sentence = say("length", "es", "train")
    assert "1 of 58 utterances (1.7%) has a text to transcribe of more tokens than the decoder's 128" in sentence
    assert facts(report, "es", "train").too_long == {"transcribe": Cases(1, ("train-2",)), "translate": Cases(0, ())}


@pytest.mark.parametrize("task", ["transcribe", "translate"])
def test_too_long_is_what_training_leaves_out(tmp_path: Path, make: Make, base: Path, task: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    made = [row("train", n, audio=sound(8.0), text="a" * n, translation="b" * (245 - n)) for n in range(120, 126)]
    for split in ("train", "validation", "test"):
        manifest(tmp_path, "es", split, made)
    found = facts(check(make(tmp_path)), "es", "train").too_long[task]
    utterances = read_split(next((tmp_path / "store" / "entries" / "prepare_split").glob("*/files/train.parquet")))
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    limit = config.max_target_positions
    taken = examples_for(utterances, tokenizer, "es", task, limit, architecture_of(config))
    left_out = {u.id for u in utterances} - {example.utterance.id for example in taken}
    assert found.count == len(left_out) > 0
    assert set(found.ids) == left_out
    assert taken


def test_audio_longer_than_the_window(report: DataReport, say: Callable[..., str]) -> None:
    assert len(LONG) / RATE > 9
    sentence = say("window", "es", "train")
    assert sentence.startswith("error: 1 of 58 utterances (1.7%) has more audio than the window of 9 s (train-2;")
    assert "raise finetune.window" in sentence
    assert facts(report, "es", "test").window == 30


def test_missing_translations_and_speakers(report: DataReport, say: Callable[..., str]) -> None:
    assert say("translations", "es", "").startswith("note: 1 of 72 utterances (train 1) has no translation")
    assert say("speakers", "es", "").startswith("note: 1 of 72 utterances (train 1) has no speaker")
    sentence = say("translations", "yue", "test")
    assert sentence.startswith("warning: no utterance has a translation, so translation cannot be scored")
    assert facts(report, "yue", "test").words_per_second is None


def test_a_train_split_without_translations_is_an_error(clean: Experiment, tmp_path: Path, make: Make) -> None:
    for split in ("train", "validation", "test"):
        manifest(tmp_path, "es", split, [row(split, n, translation=None) for n in range(2)])
    found = [f for f in check(make(tmp_path)).findings if f.about == "translations"]
    assert [(f.severity, f.split) for f in found] == [("error", "train"), ("error", "validation"), ("warning", "test")]
    assert "leave translate out of the tasks" in found[0].sentence
    assert check(make(tmp_path, tasks=["transcribe"])).findings == ()


def test_speech_that_the_touch_up_alone_is_held_on_is_checked(tmp_path: Path, make: Make) -> None:
    for language, split in (("es", "train"), ("es", "validation"), ("es", "test"), ("fr", "train")):
        manifest(tmp_path, language, split, rows(split, 3))
    merge = {"touch_up": {"steps": 1, "speech": ["yue"]}}
    held = make(tmp_path, finetune={"preserve": {"speech": ["fr"]}}, merge=merge)
    failed = [(f.language, f.split) for f in check(held).findings if f.about == "preparation"]
    assert failed == [("yue", "train")]


def test_speech_to_be_held_on_needs_no_translation_and_no_window(clean: Experiment, tmp_path: Path, make: Make) -> None:
    shutil.copytree(Path(clean.corpora.path).parents[1] / "es", tmp_path / "es")
    long = {"text": LONG, "audio": sound(len(LONG) / RATE)}
    manifest(tmp_path, "fr", "train", [row("train", n, translation=None, **long) for n in range(2)])
    held = {"window": 9, "preserve": {"speech": ["fr"]}}
    found = check(make(tmp_path, finetune=held))
    assert {finding.about for finding in found.findings} == {"repeats"}
    assert not found.failed


def test_rejected_rows_and_repeated_sentences(report: DataReport, say: Callable[..., str]) -> None:
    train = facts(report, "es", "train")
    assert train.rejected == {"silent audio": 1, "wrong encoding": 1}
    assert say("rejects", "es", "train").startswith("note: 2 of 60 rows read were rejected (silent audio: 1, wrong")
    named = [json.loads(line)["id"] for line in Path(train.rejects).read_text().splitlines()]
    assert named == ["train-9", "train-10"]
    assert train.most_repeated == {"hola mundo de todos": 2}
    assert "“hola mundo de todos” (2 times): count this split as 57 distinct" in say("repeats", "es", "train")


def test_clipped_and_quiet_audio(report: DataReport, say: Callable[..., str]) -> None:
    audio = facts(report, "es", "train").audio
    assert audio.sampled == 58
    assert audio.clipped == Cases(1, ("train-7",))
    assert audio.quiet == Cases(1, ("train-8",))
    assert say("clipping", "es", "train").startswith("note: 1 of 58 recordings that were sampled is clipped (train-7)")
    assert say("level", "es", "train").startswith("note: 1 of 58 recordings that were sampled is very quiet (train-8)")


def test_shuffled_texts_are_seen(tmp_path: Path, make: Make) -> None:
    for split, count in (("train", 60), ("validation", 3), ("test", 3)):
        made = rows(split, count)
        texts = [r["text"] for r in made]
        np.random.default_rng(0).shuffle(texts)
        manifest(tmp_path, "es", split, [r | {"text": text} for r, text in zip(made, texts, strict=True)])
    found = [f for f in check(make(tmp_path)).findings if f.about == "order"]
    assert [(f.severity, f.split) for f in found] == [("warning", "train")]
    assert "as where rows were shuffled" in found[0].sentence


def test_a_wrong_base_ends_the_check(tmp_path: Path, make: Make, base: Path) -> None:
    with pytest.raises(ConfigError, match="has no token for 'it'"):
        check(make(tmp_path, languages=["it"]))
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    manifest(tmp_path, "es", "test", rows("test", 2))
    with pytest.raises(CheckpointError, match=r"broken cannot be read \(.*copy them from its source again"):
        check(make(tmp_path, base=str(broken)))


class Document(HTMLParser):
    """The tags of a page, which must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.handle_startendtag(tag, attributes)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        self.names |= {name for name, _ in attributes}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def void_closed(text: str) -> str:
    return text.replace("<br>", "<br/>")


def test_the_page_is_self_contained_and_shows_all(report: DataReport) -> None:
    text = page(report, "Data of <b>this</b>")
    document = Document(void_closed(text))
    assert "Data of &lt;b&gt;this&lt;/b&gt;" in text
    assert not {"script", "link", "img"} & set(document.tags)
    assert not {"src", "href", "onclick"} & document.names
    assert document.tags.count("svg") == 2 * len(report.splits)
    assert text.count("<li class=") == len(report.findings)
    for heading in ("Splits", "Durations", "Speaking rate", "In common", "Characters", "Rejected rows", "Audio"):
        assert f"<h2>{heading}</h2>" in text
    assert "LATIN SMALL LETTER N WITH TILDE" in text


def test_the_page_escapes_what_a_corpus_says(tmp_path: Path, make: Make) -> None:
    evil = {"text": "<script>alert(1)</script> & más", "audio": sound(12.0), "id": "<i>", "speaker": "<u>"}
    for split in ("train", "validation", "test"):
        manifest(tmp_path, "es", split, rows(split, 9, r0=evil))
    text = page(check(make(tmp_path)), "Evil")
    assert "&lt;script&gt;" in text
    assert not {"script", "i", "u"} & set(Document(void_closed(text)).tags)


def test_the_page_of_nothing(tmp_path: Path, make: Make) -> None:
    report = check(make(tmp_path))
    assert [f.severity for f in report.findings] == ["error"] * 3
    text = page(report, "Nothing")
    Document(void_closed(text))
    assert "A run would stop at the errors" in text
    assert "<svg" not in text


def test_the_report_is_plain_data(report: DataReport) -> None:
    data = json.loads(json.dumps(report.to_json()))
    assert data["failed"] is True
    assert data["splits"][0]["too_long"]["transcribe"] == {"count": 1, "ids": ["train-2"]}
    assert {"severity", "about", "language", "split", "sentence"} == set(data["findings"][0])


amounts = st.lists(st.tuples(st.integers(1, 400), st.floats(0.1, 30)), min_size=1, max_size=30)


@given(amounts, st.floats(5, 30))
def test_misfits_are_signed_and_far_from_usual(pairs: list[tuple[int, float]], usual: float) -> None:
    characters, seconds = (np.array(column, float) for column in zip(*pairs, strict=True))
    apart = misfits(characters, seconds, usual)
    needed = characters / usual
    assert (np.sign(apart[apart != 0]) == np.sign(needed - seconds)[apart != 0]).all()
    assert (np.abs(needed - seconds)[apart != 0] > 1).all()
    assert (np.abs(apart)[apart != 0] > 1).all()
    assert not misfits(characters, characters / usual, usual).any()


def test_misfits_at_the_edges() -> None:
    cases = [(30, 1.0), (31, 1.0), (45, 1.0), (15, 3.0), (15, 3.9), (15, 4.1), (2, 1.5), (600, 30.0)]
    characters, seconds = (np.array(column, float) for column in zip(*cases, strict=True))
    assert (misfits(characters, seconds, 15.0) != 0).tolist() == [
        False, True, True, False, False, True, False, False,
    ]  # fmt: skip


def test_the_correlation_tells_speech_from_shuffled_rows() -> None:
    rng = np.random.default_rng(0)
    seconds = rng.uniform(1, 12, 400)
    characters = seconds * rng.normal(15, 3, 400)
    kept, shuffled = order_correlation(characters, seconds), order_correlation(rng.permutation(characters), seconds)
    assert kept is not None
    assert shuffled is not None
    assert kept > 0.9
    assert abs(shuffled) < 0.2
    assert order_correlation(np.full(400, 7.0), seconds) == 0
    assert order_correlation(characters, np.full(400, 5.0)) is None
    assert order_correlation(characters[:49], seconds[:49]) is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_a_distribution_counts_all(values: list[float]) -> None:
    made = Distribution.of(np.array(values), 0.5, 60)
    assert sum(made.counts) == len(values)
    assert made.counts[-1] == sum(value >= 29.5 for value in values)
    assert made.minimum <= made.p5 <= made.p25 <= made.median <= made.p75 <= made.p95 <= made.maximum


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared split of three row groups, each recording as long as its number tells."""
    path = tmp_path_factory.mktemp("large") / "train.parquet"
    tone = sound(0.6)
    write_split(
        (Candidate(f"u{n}", "hola", None, None, lambda n=n: (tone[: 3200 + n], SAMPLE_RATE)) for n in range(300)),
        path,
        language="es",
    )
    return path


def test_a_sample_is_drawn_from_all_groups(large: Path) -> None:
    drawn = list(sample_audio(large, 200))
    names = [identity for identity, _ in drawn]
    assert names == [identity for identity, _ in sample_audio(large, 200)]
    assert names != [identity for identity, _ in sample_audio(large, 200, seed=1)]
    numbers = [int(name[1:]) for name in names]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 200
    assert [len(audio) for _, audio in drawn] == [3200 + number for number in numbers]
    assert {number // 128 for number in numbers} == {0, 1, 2}
    everything = {u.id: u.audio() for u in read_split(large)}
    assert all((audio == everything[identity]).all() for identity, audio in drawn)
    assert len(list(sample_audio(large, 10_000))) == 300


@pytest.mark.parametrize(
    ("characters", "expected"),
    [("aÑœＡ", "LATIN"), ("жЁ", "CYRILLIC"), ("ｶカ", "KATAKANA"), ("語", "CJK"), ("1-'º·¿ \u0301", None)],
)
def test_scripts(characters: str, expected: str | None) -> None:
    assert {script(character) for character in characters} == {expected}


def test_what_a_language_is_written_in() -> None:
    assert not any(is_foreign(c, "es") for c in "Añoº 12, ¿l·l?")
    assert is_foreign("а", "es")
    assert not is_foreign("а", "ru")
    assert is_foreign("a", "ru")
    assert not any(is_foreign(c, "ja") for c in "カタひら漢字Aー")
