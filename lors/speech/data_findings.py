"""What the figures of prepared speech mean: sentences that say what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lors.speech.data_facts import Cases, Overlap, SplitFacts

__all__ = ["SEVERITIES", "Finding", "findings_of"]

Severity = Literal["error", "warning", "note"]
SEVERITIES = ("error", "warning", "note")

LEAST_CORRELATION = 0.3  # real speech has 0.7 and more, shuffled rows of 50 have up to 0.28
FOREIGN_SHARE = 0.01  # of the utterances: more are no loan words
BAD_SHARE = 0.05  # of clipped or quiet recordings, of rejected rows: more is a fault of the corpus, not of a file
NAMED = 5  # in a sentence


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence to act on.

    error: a run would stop at it. warning: scores would say too much, or the model would learn wrong things. note:
    to know when the results are read.
    """

    severity: Severity
    about: str
    """One word: what it is about."""
    language: str
    split: str
    """Empty where it is about all splits of the language."""
    sentence: str

    @property
    def where(self) -> str:
        """Such as `es train`, or `es`."""
        return f"{self.language} {self.split}".strip()


def findings_of(
    facts: Sequence[SplitFacts],  # of one language
    overlaps: Sequence[Overlap],  # of its splits
    tasks: Sequence[str],
    trained: bool = True,  # whether the language has experts; else others are held to the base on its train split
) -> Iterator[Finding]:
    """What the figures of a language's splits mean where `tasks` are trained."""
    held = ["train"] if not trained else []
    for split in facts:
        for kind in (_fit, _translations, _writing, _letters, _lengths, _sources, _audio):
            # Such speech needs no translation, is cut to the decoder, and drawn by the length of the training's own.
            if split.split in held and kind in (_translations, _lengths):
                continue
            for severity, about, sentence in kind(split, tasks):
                yield Finding(severity, about, split.language, split.split, sentence)
    yield from _language([split for split in facts if split.split not in held], tasks)
    for pair in dict.fromkeys((overlap.split, overlap.other) for overlap in overlaps):
        yield _in_common([overlap for overlap in overlaps if (overlap.split, overlap.other) == pair])


_Found = Iterator[tuple[Severity, str, str]]


def _fit(facts: SplitFacts, tasks: Sequence[str]) -> _Found:
    if facts.misfits.count:
        worst = facts.worst_misfits[0]
        yield (
            "warning",
            "misfits",
            f"{_part(facts.misfits.count, facts)} a text that cannot belong to the audio, {worst.id} above all "
            f"({worst.seconds:.1f} s of audio, where such a text takes {worst.usual:.1f} s): listen to "
            f"{_ids(facts.misfits)}, then mend the text or leave them out",
        )
    if facts.correlation is not None and facts.correlation < LEAST_CORRELATION:
        yield (
            "warning",
            "order",
            f"long texts do not go with long recordings (rank correlation {facts.correlation:.2f}, where speech has "
            "0.7 and more), as where rows were shuffled or a column is off by one: compare a few recordings with "
            "their texts",
        )


def _translations(facts: SplitFacts, tasks: Sequence[str]) -> _Found:
    if "translate" in tasks and facts.without_translation == facts.utterances:
        test = facts.split == "test"
        result = "translation cannot be scored" if test else "the expert that translates cannot be trained"
        yield (
            "warning" if test else "error",
            "translations",
            f"no utterance has a translation, so {result}: map a column to `translation`, or leave translate out of "
            "the tasks",
        )


def _language(facts: Sequence[SplitFacts], tasks: Sequence[str]) -> Iterator[Finding]:
    """What splits rarely differ in, said once."""
    if speechless := {split.split: split.without_speaker for split in facts if split.without_speaker}:
        yield Finding(
            "note",
            "speakers",
            facts[0].language,
            "",
            f"{_parts(speechless, facts)} no speaker, so voices that splits share go unseen and the scores' intervals "
            "come out too narrow: map a column to `speaker` where the source has one",
        )
    some = {split.split: split.without_translation for split in facts if split.without_translation < split.utterances}
    if "translate" in tasks and (some := {split: count for split, count in some.items() if count}):
        yield Finding(
            "note",
            "translations",
            facts[0].language,
            "",
            f"{_parts(some, facts)} no translation and will be left out of translate: add them to the source, or read "
            "that task's results as of fewer utterances",
        )


def _writing(facts: SplitFacts, tasks: Sequence[str]) -> _Found:
    if facts.unwritten.count:
        which = f", because it lacks {_characters(facts.unwritable)}" if facts.unwritable else ""
        yield (
            "warning",
            "tokenizer",
            f"{_part(facts.unwritten.count, facts)} a text that the base's tokenizer cannot write{which} (see "
            f"{_ids(facts.unwritten)}): replace those characters in the texts, or take a base that has them",
        )


def _letters(facts: SplitFacts, tasks: Sequence[str]) -> _Found:
    if facts.foreign.count:
        yield (
            "warning" if facts.foreign.count > FOREIGN_SHARE * facts.utterances else "note",
            "script",
            f"{_part(facts.foreign.count, facts)} letters of another script than that of the language "
            f"({_characters(facts.foreign_letters)}; see {_ids(facts.foreign)}): look for a wrong language, a wrong "
            "encoding or letters that only look alike",
        )


def _lengths(facts: SplitFacts, tasks: Sequence[str]) -> _Found:
    test = facts.split == "test"
    for task, cases in facts.too_long.items():
        if cases.count:
            fate = "the model cannot write to its end" if test else "training will leave out"
            yield (
                "warning",
                "length",
                f"{_part(cases.count, facts)} a text to {task} of more tokens than the decoder's {facts.token_limit}, "
                f"which {fate} ({_ids(cases)}): cut these recordings into sentences",
            )
    if facts.outside_window.count:
        yield (
            "error",
            "window",
            f"{_part(facts.outside_window.count, facts)} more audio than the window of {facts.window:g} s "
            f"({_ids(facts.outside_window)}; the longest lasts {facts.seconds.maximum:.1f} s): raise "
            f"{'evaluate' if test else 'finetune'}.window, or leave them out with corpora.max_seconds",
        )


def _sources(facts: SplitFacts, tasks: Sequence[str]) -> _Found:
    if facts.repeated and facts.split == "train":
        text, number = next(iter(facts.most_repeated.items()))
        yield (
            "note",
            "repeats",
            f"{_part(facts.repeated, facts)} a sentence that an earlier one has, most often {_quoted(text)} ({number} "
            f"times): count this split as {facts.utterances - facts.repeated} distinct sentences",
        )
    if bad := sum(facts.rejected.values()):
        rows = bad + facts.utterances
        reasons = ", ".join(f"{reason}: {number}" for reason, number in facts.rejected.items())
        yield (
            "warning" if bad > BAD_SHARE * rows else "note",
            "rejects",
            f"{bad} of {rows} rows read were rejected ({reasons}): mend them in the source; each is named in "
            f"{facts.rejects}",
        )


def _audio(facts: SplitFacts, tasks: Sequence[str]) -> _Found:
    for about, cases, what, remedy in (
        ("clipping", facts.audio.clipped, "clipped", "look for originals that are not, or record at a lower gain"),
        ("level", facts.audio.quiet, "very quiet", "listen whether they hold speech, and raise the gain of what does"),
    ):
        if cases.count:
            verb = "is" if cases.count == 1 else "are"
            yield (
                "warning" if cases.count > BAD_SHARE * facts.audio.sampled else "note",
                about,
                f"{cases.count} of {facts.audio.sampled} recordings that were sampled {verb} {what} ({_ids(cases)}): "
                f"{remedy}",
            )


def _in_common(overlaps: Sequence[Overlap]) -> Finding:
    """What one split shares with another one."""
    first = overlaps[0]
    shared = " and ".join(
        f"{_count(overlap.utterances, 'utterance')} ({overlap.share:.1%}) {_have(overlap.utterances)} "
        f"{_count(overlap.shared, overlap.about[:-1])}"
        for overlap in overlaps
    )
    examples = [_quoted(text) for text in first.examples[: NAMED if first.about == "speakers" else 2]]
    by = "speaker" if first.about == "speakers" else "sentence"
    tested = first.split == "test" and first.other != "validation"
    if tested:
        effect = f"so the scores say too much about new {by}s: split the corpus by {by}, or drop these from train"
    elif first.other == "train":
        effect = f"so what is chosen on validation is chosen on known {by}s: split the corpus by {by}"
    else:
        effect = f"so what is chosen on validation is chosen on {by}s of the test: split the corpus by {by}"
    return Finding(
        "warning" if tested else "note",
        "overlap",
        first.language,
        first.split,
        f"{shared} that {first.other} has too ({_listed(examples, first.shared)}), {effect}",
    )


def _part(count: int, facts: SplitFacts) -> str:
    """`3 of 40 utterances (7.5%) have`."""
    return f"{count} of {facts.utterances} utterances ({count / facts.utterances:.1%}) {_have(count)}"


def _parts(counts: Mapping[str, int], facts: Sequence[SplitFacts]) -> str:
    """The same over some splits of one language, each named."""
    count, every = sum(counts.values()), sum(split.utterances for split in facts)
    splits = ", ".join(f"{split} {number}" for split, number in counts.items())
    return f"{count} of {every} utterances ({splits}) {_have(count)}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _ids(cases: Cases) -> str:
    return _listed(cases.ids, cases.count)


def _listed(names: Sequence[str], count: int) -> str:
    """The first names, of `count` that there are."""
    shown = names[:NAMED]
    return ", ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")


def _quoted(text: str) -> str:
    return f"“{text if len(text) <= 50 else text[:49] + '…'}”"


def _characters(counts: Mapping[str, int]) -> str:
    """`ę U+0119 12 times, ...`."""
    shown = [
        f"{character} U+{ord(character):04X} {'once' if number == 1 else f'{number} times'}"
        for character, number in list(counts.items())[:NAMED]
    ]
    return ", ".join(shown) + (" and others" if len(counts) > NAMED else "")
