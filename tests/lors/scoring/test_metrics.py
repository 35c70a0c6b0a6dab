"""Scores against hand computation and the reference libraries; intervals against what a bootstrap must satisfy."""

from __future__ import annotations

import math
import time
from importlib.metadata import version
from typing import Any

import jiwer
import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.significance import PairedTest

from lors.errors import InputError
from lors.scoring.bootstrap import Blocks, interval, p_value, percent
from lors.scoring.metrics import METRICS, _bleu, _chrf, difference, main_metric, score
from lors.scoring.normalise import normalise

WORDS = ("el", "gat", "negre", "dorm", "a", "casa", "seva", "Avui", "plou", "molt,", "demà", "no.")


def differs(*arguments: Any, **options: Any) -> bool:
    found = difference(*arguments, **options)
    return found.low > 0 or found.high < 0


def corpus(n: int, error: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """References and hypotheses that differ in a share of the words: substituted, dropped or doubled."""
    generator = np.random.default_rng(seed)
    references, hypotheses = [], []
    for _ in range(n):
        words = [str(word) for word in generator.choice(WORDS, generator.integers(4, 16))]
        references.append(" ".join(words))
        edits = [
            generator.choice(["error", "", f"{word} {word}"]) if generator.random() < error else word for word in words
        ]
        hypotheses.append(" ".join(edit for edit in edits if edit))
    return references, hypotheses


def test_wer_and_cer_by_hand() -> None:
    references = ["The cat sat.", "It's a dog!", "yes"]
    hypotheses = ["the cat sat down", "it's the dog", ""]
    # Words: 1 insertion, 1 substitution, 1 deletion over 3 + 3 + 1.
    assert score("wer", references, hypotheses, language="en").value == pytest.approx(100 * 3 / 7)
    # Characters: " down", a to the (one substitution, two insertions), "yes" over 11 + 10 + 3.
    assert score("cer", references, hypotheses, language="en").value == pytest.approx(100 * (5 + 3 + 3) / 24)


@pytest.mark.parametrize("normaliser", ["lors", "whisper_basic", "none"])
def test_error_rates_equal_jiwer(normaliser: str) -> None:
    references, hypotheses = corpus(60, 0.3)
    clean = [[normalise(text, "ca", normaliser) for text in texts] for texts in (references, hypotheses)]
    wer = score("wer", references, hypotheses, language="ca", normaliser=normaliser)
    cer = score("cer", references, hypotheses, language="ca", normaliser=normaliser)
    assert wer.value == 100 * jiwer.wer(*clean)
    assert cer.value == 100 * jiwer.cer(*clean)


def test_bleu_and_chrf_equal_sacrebleu_on_raw_text() -> None:
    references, hypotheses = corpus(60, 0.3)
    bleu = sacrebleu.corpus_bleu(hypotheses, [references])
    chrf = sacrebleu.corpus_chrf(hypotheses, [references])
    assert score("bleu", references, hypotheses, language="ca").value == bleu.score
    assert score("chrf", references, hypotheses, language="ca").value == chrf.score
    assert score("bleu", ["The Cat sat here."], ["the cat sat here"], language="ca").value < 100  # case counts


@given(
    st.lists(
        st.tuples(*[st.lists(st.sampled_from([*"abcd", "ab"]), max_size=8).map(" ".join)] * 2), min_size=1, max_size=6
    )
)
@settings(max_examples=150)
def test_the_vectorised_scores_equal_the_libraries(pairs: list[tuple[str, str]]) -> None:
    """What is computed for every resample is what the libraries compute, on short and empty texts too."""
    references, hypotheses = [a for a, _ in pairs], [b for _, b in pairs]
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    for scorer, vectorised in ((bleu, _bleu), (chrf, _chrf)):
        rows = np.array(scorer._extract_corpus_statistics(hypotheses, [references]), dtype=float)
        expected = scorer.corpus_score(hypotheses, [references]).score
        assert vectorised(rows.sum(axis=0, keepdims=True)) == pytest.approx(expected, abs=1e-9)
    words = jiwer.process_words(references, hypotheses)
    edits = words.substitutions + words.deletions + words.insertions
    length = words.hits + words.substitutions + words.deletions
    assert percent(np.array([[edits, length]], dtype=float)) == pytest.approx(100 * words.wer)
    assert score("wer", references, hypotheses, language="es", resamples=10).value == pytest.approx(100 * words.wer)


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_brackets_the_value_and_is_deterministic(metric: str) -> None:
    references, hypotheses = corpus(80, 0.3)
    result = score(metric, references, hypotheses, language="ca")
    assert result.low < result.value < result.high
    assert result == score(metric, references, hypotheses, language="ca")
    other = score(metric, references, hypotheses, language="ca", seed=1)
    assert (other.low, other.high) != (result.low, result.high)
    assert other.low == pytest.approx(result.low, abs=(result.high - result.low) / 5)


def test_the_interval_is_the_bootstrap_of_the_definition() -> None:
    """Against a plain loop of other draws: the quantiles of corpus WER over resampled utterances."""
    references, hypotheses = corpus(60, 0.3)
    words = [
        jiwer.process_words(r, h)
        for r, h in zip(*[[normalise(t, "ca") for t in x] for x in (references, hypotheses)], strict=True)
    ]
    errors = np.array([w.substitutions + w.deletions + w.insertions for w in words])
    lengths = np.array([w.hits + w.substitutions + w.deletions for w in words])
    generator = np.random.default_rng(7)
    draws = [generator.integers(0, 60, 60) for _ in range(4000)]
    low, high = np.quantile([100 * errors[d].sum() / lengths[d].sum() for d in draws], [0.025, 0.975])
    result = score("wer", references, hypotheses, language="ca", resamples=4000)
    assert result.low == pytest.approx(low, abs=0.4)
    assert result.high == pytest.approx(high, abs=0.4)


@pytest.mark.parametrize("metric", METRICS)
def test_intervals_shrink_with_more_utterances(metric: str) -> None:
    few = score(metric, *corpus(30, 0.3), language="ca")
    many = score(metric, *corpus(480, 0.3), language="ca")
    assert (many.high - many.low) < 0.5 * (few.high - few.low)  # 1/4 by the square root of the sizes


def test_signatures() -> None:
    references, hypotheses = corpus(5, 0.3)
    assert score("wer", references, hypotheses, language="es").signature == (
        f"jiwer:{version('jiwer')}|normaliser:lors.1|lang:es|bootstrap:1000.seed:0|by:utterance"
    )
    bleu = score("bleu", references, hypotheses, language="es", resamples=50, seed=3).signature
    assert bleu == (
        f"BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
        "|lang:es|bootstrap:50.seed:3|by:utterance"
    )
    assert score("chrf", references, hypotheses, language="es").signature.startswith(
        "chrF2|nrefs:1|case:mixed|eff:yes|nc:6"
    )


def test_speakers_are_resampled_only_where_there_are_enough() -> None:
    references, hypotheses = corpus(120, 0.0)
    hypotheses = [text if i % 12 else "error" for i, text in enumerate(hypotheses)]  # all errors are speaker 0's
    of_12: list[str | None] = [f"s{i % 12}" for i in range(120)]
    by_speaker = score("wer", references, hypotheses, language="ca", speakers=of_12)
    by_utterance = score("wer", references, hypotheses, language="ca")
    assert by_speaker.signature.endswith("|by:speaker")
    assert by_speaker.value == by_utterance.value
    assert by_speaker.high - by_speaker.low > 1.5 * (by_utterance.high - by_utterance.low)
    of_9: list[str | None] = [f"s{i % 9}" for i in range(120)]
    for too_few in (of_9, [None, *of_12[1:]], [None] * 120):
        assert score("wer", references, hypotheses, language="ca", speakers=too_few) == by_utterance


def test_empty_texts_and_a_single_utterance() -> None:
    assert score("wer", ["", "a b"], ["x", ""], language="es").value == 150  # 1 insertion, 2 deletions over 2 words
    assert score("wer", [""], [""], language="es").value == 0
    assert score("cer", ["!"], ["no"], language="es").value == 100 * jiwer.cer("", "no")
    for metric in ("bleu", "chrf"):
        assert score(metric, ["a b c d", ""], ["", ""], language="es").value == 0
    alone = score("wer", ["a b"], ["a c"], language="es")
    assert alone.value == 50
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)


def test_input_errors_name_the_cause() -> None:
    with pytest.raises(InputError, match=r"wer for 'es' has no utterances"):
        score("wer", [], [], language="es")
    with pytest.raises(InputError, match=r"2 references and 1 hypotheses"):
        score("wer", ["a", "b"], ["a"], language="es")
    with pytest.raises(InputError, match=r"no metric 'ter'; choose one of wer, cer, bleu, chrf"):
        score("ter", ["a"], ["a"], language="es")
    with pytest.raises(InputError, match=r"no reference for 1 of 2"):
        score("bleu", ["a", None], ["a", "b"], language="es")  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"1 speakers for 2 utterances"):
        score("wer", ["a", "b"], ["a", "b"], language="es", speakers=["x"])
    with pytest.raises(InputError, match=r"0 resamples"):
        score("wer", ["a"], ["a"], language="es", resamples=0)


def test_p_values_by_hand() -> None:
    blocks = Blocks.of_utterances(5, None)
    differences = np.array([-2.0, -1.0, 0.0, *range(1, 97)])  # 3 of 99 on the rarer side, the 0 on both
    for values in (differences, -differences, np.append(differences, np.nan)):
        assert p_value(values, blocks) == pytest.approx(2 * (3 + 1) / (99 + 1))
    assert p_value(np.zeros(99), blocks) == 1
    assert math.isnan(p_value(differences, Blocks.of_utterances(1, None)))
    assert math.isnan(p_value(np.full(3, np.nan), blocks))
    assert all(math.isnan(end) for end in interval(np.full(3, np.nan), blocks))


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_p_values_are_near_sacrebleu_s(metric: str) -> None:
    """sacrebleu centres the resampled differences where this counts those beyond 0; on a fair sample they are close."""
    references, worse = corpus(150, 0.3)
    for better in (corpus(150, 0.27, seed=1)[1], corpus(150, 0.2, seed=2)[1]):
        own = difference(metric, references, better, worse, language="ca", resamples=2000)
        scorer = (
            sacrebleu.BLEU(references=[references]) if metric == "bleu" else sacrebleu.CHRF(references=[references])
        )
        test = PairedTest([("a", worse), ("b", better)], {metric: scorer}, None, test_type="bs", n_samples=2000)
        result = next(found for name, found in test()[1].items() if name != "System")[1]
        assert own.p == pytest.approx(result.p_value, abs=0.04)
        assert own.value == pytest.approx(result.score - score(metric, references, worse, language="ca").value)


@given(st.integers(0, 30), st.sampled_from(METRICS))
@settings(max_examples=20)
def test_a_difference_has_a_mirror_image_and_none_to_itself(seed: int, metric: str) -> None:
    references, a = corpus(25, 0.3, seed=seed)
    b = corpus(25, 0.2, seed=seed + 1)[1]
    there, back = (difference(metric, references, *pair, language="ca", resamples=60) for pair in ((a, b), (b, a)))
    assert (there.value, there.p) == (-back.value, back.p)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    same = difference(metric, references, a, list(a), language="ca", resamples=60)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


@pytest.mark.parametrize("metric", METRICS)
def test_differs_needs_more_than_noise(metric: str) -> None:
    references, a = corpus(150, 0.3)
    worse = [text.replace("casa", "cosa") for text in a]
    assert not differs(metric, references, a, a, language="ca")
    assert differs(metric, references, a, worse, language="ca")
    assert differs(metric, references, worse, a, language="ca")
    assert not differs(metric, references[:1], a[:1], worse[:1], language="ca")  # one utterance proves nothing
    one_change = [*a[:-1], references[-1]]
    assert not differs(metric, references, a, one_change, language="ca")


def test_differs_is_paired() -> None:
    """A small gain on every other utterance shows although the two intervals overlap."""
    generator = np.random.default_rng(0)
    references = ["a b c d e f g h"] * 60
    shares = generator.integers(1, 7, 60)
    a = [" ".join(["x"] * k + ["y"] * (i % 2) + "a b c d e f g h".split()[k + i % 2 :]) for i, k in enumerate(shares)]
    b = [" ".join(["x"] * k + "a b c d e f g h".split()[k:]) for k in shares]
    first, second = (score("wer", references, texts, language="es") for texts in (a, b))
    assert second.high > first.low
    assert differs("wer", references, a, b, language="es")


def test_the_main_metric() -> None:
    assert [main_metric("transcribe", x) for x in ("es", "zh", "th-TH")] == ["wer", "cer", "cer"]
    assert main_metric("translate", "zh") == "bleu"


TEXTS = st.lists(st.sampled_from(WORDS), min_size=4, max_size=9).map(" ".join)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_identical_is_perfect_and_order_does_not_matter(pairs: list[tuple[str, str]], random: object) -> None:
    references, hypotheses = [a for a, _ in pairs], [b for _, b in pairs]
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for metric, perfect in zip(METRICS, (0, 0, 100, 100), strict=True):
        assert score(metric, references, references, language="ca", resamples=20).value == pytest.approx(perfect)
        value = score(metric, references, hypotheses, language="ca", resamples=20).value
        again = score(metric, [a for a, _ in shuffled], [b for _, b in shuffled], language="ca", resamples=20).value
        assert again == value


def test_five_hundred_utterances_are_quick() -> None:
    references, hypotheses = corpus(500, 0.2)
    for metric, seconds in (("wer", 1.0), ("cer", 1.0), ("bleu", 3.0), ("chrf", 3.0)):
        start = time.process_time()
        score(metric, references, hypotheses, language="ca")
        assert time.process_time() - start < seconds


def test_many_utterances_are_resampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on memory does not change the draws."""
    references, hypotheses = corpus(40, 0.3)
    whole = score("wer", references, hypotheses, language="ca")
    monkeypatch.setattr("lors.scoring.bootstrap._DRAWS_AT_ONCE", 130)
    assert score("wer", references, hypotheses, language="ca") == whole
