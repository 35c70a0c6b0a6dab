"""Learning without forgetting: what else an utterance is asked for, and the base that says what to answer there.

An expert is trained with one prompt, `<|es|><|transcribe|>` say, so nothing tells it what of its change belongs to that
prompt: its decoder learns to write Spanish whatever it is asked for, and two such experts undo each other once they are
merged. Here the same utterance is also given another prompt, and there the expert is held to the base (Li and Hoiem
2016, Learning without Forgetting, arXiv 1606.09282, section 3, with the Kullback-Leibler divergence). That needs no
speech of other languages. What an expert does to those is held only where there is some to hold it on: a few utterances
of other languages, the same for all experts, so that an expert stays its own language's work.
"""

from __future__ import annotations

import functools
import random
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lors.errors import ConfigError, InputError

if TYPE_CHECKING:
    from lors.speech.architecture import Architecture
    from lors.speech.corpus import Utterance
    from lors.training.examples import Example

__all__ = ["Base", "Prompts"]

_TASKS = ("transcribe", "translate")


@dataclass(frozen=True, slots=True)
class Base:
    """What a training holds its model to."""

    model: Any
    """In evaluation mode, on the device of the trained one."""
    weight: float
    """Of the divergence, beside the cross-entropy."""
    shares_encoder: bool = False
    """Whether the trained model's encoder is this one's too: it is frozen, so its output serves both."""


class Prompts:
    """The labels of an utterance after another prompt than its own."""

    def __init__(
        self,
        tokenizer: Any,
        architecture: Architecture,
        limit: int,  # the most labels that the decoder has positions for
        trained: Collection[tuple[str, str]],  # the (language, task)s that the model is trained on
        languages: Sequence[str] = (),  # whose prompts are drawn; all that the base knows where there are none
        speech: Mapping[str, Sequence[Utterance]] | None = None,  # of other languages; ids as `Inputs` keeps them
    ) -> None:
        """Raises ConfigError where the base does not know a language, or there is no prompt but the trained ones."""
        known = architecture.languages(tokenizer)
        if not known:
            raise ConfigError(
                f"finetune.preserve holds experts to the base under other prompts, and this {architecture.name} base "
                "takes one alone: leave it out"
            )
        if unknown := [language for language in languages if language not in known]:
            raise ConfigError(
                f"finetune.preserve.languages: the base has no language {unknown[0]!r}; it has {', '.join(known)}"
            )
        self._tokenizer, self._architecture, self._limit = tokenizer, architecture, limit
        self._others = [(code, to) for code in (languages or known) for to in _TASKS if (code, to) not in trained]
        self._trained = set(trained)
        # A prefix reads the whole vocabulary: once for each prompt, not for each utterance.
        self._prefix = functools.cache(functools.partial(architecture.prefix, tokenizer))
        if not self._others:
            raise ConfigError("finetune.preserve.languages: all prompts of these languages are trained on, list more")
        spoken = [(utterance, code) for code, found in (speech or {}).items() for utterance in found]
        self._speech = sorted(spoken, key=lambda one: (one[0].seconds, one[1], one[0].id))
        self._seconds = [utterance.seconds for utterance, _ in self._speech]

    def elsewhere(
        self,
        seed: str,  # of the draw
        seconds: float,  # no longer utterance
    ) -> tuple[Utterance, tuple[int, ...]] | None:
        """For half of the seeds an utterance of another language, and its labels after a prompt of its own language.

        None for the other half, and where no speech of other languages is that short.
        """
        rng, count = random.Random(f"elsewhere-{seed}"), bisect_right(self._seconds, seconds)
        if count == 0 or rng.random() < 0.5:
            return None
        utterance, language = self._speech[rng.randrange(count)]
        task = rng.choice(_TASKS)
        text = utterance.target(task) or utterance.target("transcribe") or ""
        return utterance, self._after(language, task, text)

    def labels(
        self,
        example: Example,  # whose `group` is its language and task
        seed: str,  # of the draw
    ) -> tuple[int, ...]:
        """For half of the seeds the other task of the example's language, where that is not trained; else any prompt
        that is not.

        The text is the utterance's own for that task, or, where it has none, the one that the example is trained on.
        """
        language, _, task = example.group.rpartition("-")
        if task not in _TASKS:
            raise InputError(f"the example's group {example.group!r} is no language and task, such as es-transcribe")
        rng, other = random.Random(f"preserve-{seed}"), {"transcribe": "translate", "translate": "transcribe"}[task]
        near = (language, other) not in self._trained and rng.random() < 0.5
        spoken, wanted = (language, other) if near else rng.choice(self._others)
        text = example.utterance.target(wanted) or example.utterance.target(task) or ""
        return self._after(spoken, wanted, text)

    def _after(self, language: str, task: str, text: str) -> tuple[int, ...]:
        """The labels of a text after a prompt."""
        prefix = self._prefix(language, task)
        ids = self._architecture.text_tokens(self._tokenizer, text)
        return (*prefix, *ids, self._tokenizer.eos_token_id)[: self._limit]
