"""Which utterances a batch holds: an order that depends on the seed alone, little padding, a bounded batch.

Nothing here looks at audio, so a resumed training walks past its finished batches at no cost.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Draw", "batches", "draws", "share"]

# Utterances of this many batches are sorted by length together: little padding, and batches still differ by epoch.
_SORTED_BATCHES = 32


@dataclass(frozen=True, slots=True)
class Draw:
    """One use of an example: its index, and how many times all of its group was used before."""

    index: int
    epoch: int


def draws(groups: Sequence[str], temperature: float, seed: int) -> Iterator[list[Draw]]:
    """Epoch after epoch, each of as many draws as there are examples; `groups` names the group of each example.

    With temperature 1 an epoch is a shuffle of all examples. Above, each draw takes a group with probability
    proportional to n^(1 / temperature), n its examples (Arivazhagan et al. 2019, section 4.2), and of the group an
    example that was not taken since the group was last used up.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    decks = {group: _deck(indices, f"{seed}-{group}") for group, indices in members.items()}
    weights = [len(indices) ** (1 / temperature) for indices in members.values()]
    for epoch in itertools.count():
        rng = random.Random(f"{seed}-{epoch}")
        if temperature == 1:
            order = list(range(len(groups)))
            rng.shuffle(order)
            yield [Draw(index, epoch) for index in order]
        else:
            chosen = rng.choices(list(members), weights, k=len(groups))
            yield [next(decks[group]) for group in chosen]


def _deck(indices: Sequence[int], seed: str) -> Iterator[Draw]:
    for epoch in itertools.count():
        order = list(indices)
        random.Random(f"{seed}-{epoch}").shuffle(order)
        yield from (Draw(index, epoch) for index in order)


def batches(
    found: Sequence[Draw],
    seconds: Mapping[Draw, float],  # how long each lasts
    batch_seconds: float,
    window: Callable[[float], float],  # the window for a longest utterance
    rng: random.Random,
) -> list[list[Draw]]:
    """The draws of one epoch in batches whose (count x window) stays within `batch_seconds`, shuffled.

    A batch is sorted by length. An utterance whose window alone is longer is a batch of its own.
    """
    typical = window(max(seconds[draw] for draw in found))
    pool = max(1, _SORTED_BATCHES * int(batch_seconds / typical))
    out: list[list[Draw]] = []
    for start in range(0, len(found), pool):
        batch: list[Draw] = []
        for draw in sorted(found[start : start + pool], key=lambda draw: (seconds[draw], draw.index, draw.epoch)):
            if batch and (len(batch) + 1) * window(seconds[draw]) > batch_seconds:
                out.append(batch)
                batch = []
            batch.append(draw)
        out.append(batch)
    rng.shuffle(out)
    return out


def share(batch: Sequence[Draw], number: int, count: int) -> Sequence[Draw]:
    """Part `number` of `count` consecutive parts of a batch, whose sizes differ by at most one; some may be empty."""
    return batch[len(batch) * number // count : len(batch) * (number + 1) // count]
