"""From examples to the tensors of a batch: speed, features, masks, padding, labels."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from lors.errors import ConfigError
from lors.speech.architecture import Architecture, FeatureCache
from lors.speech.corpus import Utterance
from lors.speech.features import FRAMES_PER_SECOND
from lors.training.augment import change_speed, spec_augment, speed_of
from lors.training.batches import Draw, batches, draws, share
from lors.training.examples import Example
from lors.training.loss import decoder_inputs, label_rows
from lors.training.preserve import Prompts
from lors.training.settings import Augment

__all__ = ["Batch", "Inputs", "Others", "Part", "ahead"]

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Others:
    """Other prompts and their texts, one for each utterance of a part."""

    decoder_input_ids: Tensor
    """(B, T)"""
    labels: Tensor
    """(B, T)"""
    heard: dict[str, Tensor] | None = None
    """The encoder's inputs; None: those of the part."""

    def split(self, count: int) -> list[Others]:
        """So many consecutive parts of it."""
        heard = [None] * count if self.heard is None else _split(self.heard, count)
        columns = (self.decoder_input_ids.tensor_split(count), self.labels.tensor_split(count), heard)
        return [Others(own, rows, inputs) for own, rows, inputs in zip(*columns, strict=True)]


def _split(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    columns = [tensor.tensor_split(count) for tensor in tensors.values()]
    return [dict(zip(tensors, rows, strict=True)) for rows in zip(*columns, strict=True)]


@dataclass(frozen=True, slots=True)
class Part:
    """Utterances that a model computes at once."""

    inputs: dict[str, Tensor]
    """What the model takes: its encoder's inputs, and decoder_input_ids (B, T)."""
    labels: Tensor
    """(B, T)"""
    weight: float
    """0 where the process has no share of the batch and computes only to keep step with the others."""
    others: Others | None = None
    """What the same utterances are asked for beside, where the model is held to the base there."""

    def split(self, count: int) -> list[Part]:
        """At most so many consecutive parts of it, none empty."""
        count = min(count, len(self.labels))
        inputs, labels = _split(self.inputs, count), self.labels.tensor_split(count)
        others = [None] * count if self.others is None else self.others.split(count)
        return [Part(own, rows, self.weight, more) for own, rows, more in zip(inputs, labels, others, strict=True)]


@dataclass(frozen=True, slots=True)
class Batch:
    """One process's share of a batch, in parts; the figures are of the whole batch."""

    parts: list[Part]
    window: float
    """Seconds."""
    tokens: int
    samples: int

    def split(self, count: int) -> Batch:
        """The same batch with each part in at most so many."""
        return replace(self, parts=[piece for part in self.parts for piece in part.split(count)])


@dataclass(frozen=True, slots=True)
class _Heard:
    """An utterance at a speed, as a `FeatureCache` takes it."""

    utterance: Utterance
    speed: float

    @property
    def id(self) -> str:
        return f"{self.utterance.id} at {self.speed}"

    def audio(self) -> np.ndarray:
        return change_speed(self.utterance.audio(), self.speed)


class Inputs:
    """Examples as batches of tensors; what an example becomes depends on the seed, the epoch and its id alone."""

    def __init__(
        self,
        examples: Sequence[Example],
        architecture: Architecture,
        config: Any,  # a copy: a model's own changes while its windows are short
        window: float | str,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        prompts: Prompts | None = None,  # other prompts for the utterances, where the model is held to the base there
        kept_bytes: int = 2 << 30,  # of features, from one epoch to the next
    ) -> None:
        """Raises ConfigError where an utterance does not fit the window, or the model hears no spectrograms to mask."""
        self._examples, self._architecture, self._config = examples, architecture, config
        self._setting, self._augment, self._seed, self._prompts = window, augment or Augment(), seed, prompts
        self._room = self._window(architecture.native_window(config))
        self._features = FeatureCache(architecture, config, kept_bytes)
        longest = max((e.utterance for e in examples), key=lambda utterance: utterance.seconds)
        if longest.seconds > self._room + 1 / FRAMES_PER_SECOND:
            native = architecture.native_window(config)
            raise ConfigError(
                f"utterance {longest.id} lasts {longest.seconds:.1f} s, more than the window of {self._room:g} s: "
                f"widen the window (the base takes {native:g} s at most) or lower corpora.max_seconds"
            )
        if self._augment.spec_augment is not None and not architecture.spectrogram:
            raise ConfigError(
                f"finetune.augment.spec_augment masks spectrograms, and a {architecture.name} base hears raw audio: "
                "leave it out; speed works"
            )

    def once(self, batch_seconds: float) -> list[list[Draw]]:
        """All examples, each in one batch."""
        return self._batches([Draw(index, 0) for index in range(len(self._examples))], batch_seconds, "once")

    def forever(self, batch_seconds: float, temperature: float) -> Iterator[list[Draw]]:
        """The batches of one epoch after the other."""
        groups = [example.group for example in self._examples]
        for epoch, found in enumerate(draws(groups, temperature, self._seed)):
            yield from self._batches(found, batch_seconds, f"{self._seed}-{epoch}")

    def batch(self, batch: Sequence[Draw], parts: int = 1, number: int = 0, processes: int = 1) -> Batch:
        """The share of process `number`, in at most `parts` parts, all in the window of the whole batch."""
        longest = max(self._seconds(draw) for draw in batch)
        own = share(batch, number, processes)
        pieces = [piece for k in range(parts) if (piece := share(own, k, parts))]
        tokens = sum(len(self._examples[draw.index].labels) for draw in batch)
        if pieces:
            computed = [self._part(piece, longest, 1.0) for piece in pieces]
        else:
            computed = [self._part(batch[:1], longest, 0.0)]
        return Batch(computed, self._window(longest), tokens, len(batch))

    def _part(
        self,
        piece: Sequence[Draw],
        longest: float,  # utterance of the whole batch, in seconds: other parts and processes change nothing
        weight: float,
    ) -> Part:
        examples = [self._examples[draw.index] for draw in piece]
        features = self._features.features([_Heard(self._utterance(draw), self._speed(draw)) for draw in piece])
        if (masks := self._augment.spec_augment) is not None:
            pairs = zip(piece, features, strict=True)
            features = [spec_augment(mel, masks, self._draw_seed(draw)) for draw, mel in pairs]
        inputs = self._architecture.collate(self._config, features, self._window(longest))
        decoder, labels = self._read_and_written([example.labels for example in examples])
        others = None if self._prompts is None else self._others(self._prompts, piece, features, longest)
        return Part({**inputs, "decoder_input_ids": decoder}, labels, weight, others)

    def _others(self, prompts: Prompts, piece: Sequence[Draw], features: Sequence[Any], longest: float) -> Others:
        """What stands beside each utterance: it again, or one of another language, with another prompt."""
        asked, spoken = [], dict[int, _Heard]()
        for place, draw in enumerate(piece):
            seed = self._draw_seed(draw)
            if (found := prompts.elsewhere(seed, longest)) is None:
                asked.append(prompts.labels(self._examples[draw.index], seed))
            else:
                utterance, labels = found
                asked.append(labels)
                spoken[place] = _Heard(utterance, 1.0)
        inputs = None
        if spoken:
            heard = dict(enumerate(features))
            heard |= zip(spoken, self._features.features(list(spoken.values())), strict=True)
            inputs = self._architecture.collate(self._config, list(heard.values()), self._window(longest))
        return Others(*self._read_and_written(asked), inputs)

    def _read_and_written(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:  # both (B, T)
        labels = label_rows(rows)
        return decoder_inputs(labels, self._config.decoder_start_token_id), labels

    def _batches(self, found: Sequence[Draw], batch_seconds: float, seed: str) -> list[list[Draw]]:
        return batches(found, {d: self._seconds(d) for d in found}, batch_seconds, self._window, random.Random(seed))

    def _utterance(self, draw: Draw) -> Utterance:
        return self._examples[draw.index].utterance

    def _draw_seed(self, draw: Draw) -> str:
        return f"{self._seed}-{draw.epoch}-{self._utterance(draw).id}"

    def _speed(self, draw: Draw) -> float:
        """1 also where the utterance, slowed down, would not fit the window."""
        speed = speed_of(self._augment.speed, self._draw_seed(draw))
        return speed if self._utterance(draw).seconds / speed <= self._room else 1.0

    def _seconds(self, draw: Draw) -> float:
        return self._utterance(draw).seconds / self._speed(draw)

    def _window(self, seconds: float) -> float:
        return self._architecture.window_for(self._config, seconds, self._setting)


def ahead(items: Iterable[T], compute: Callable[[T], U], count: int) -> Generator[U]:
    """`compute` of each item in turn; with `count` above 0 in another thread, so many items ahead."""
    if count == 0:
        yield from map(compute, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(compute, item) for item in islice(items, count))
        try:
            while waiting:
                done = waiting.popleft()
                waiting.extend(thread.submit(compute, item) for item in islice(items, 1))
                yield done.result()
        finally:
            for future in waiting:
                future.cancel()
