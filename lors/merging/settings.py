"""The settings of a merge: the experiment's `merge` section. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from lors.errors import InputError
from lors.merging.recipe import Group
from lors.merging.registry import METHODS, make_recipe
from lors.settings import Language, Section, nearest
from lors.training.settings import Validation

__all__ = ["TOUCHED_UP", "Added", "Merge", "ScalingSearch", "TouchUp", "known_method"]

TOUCHED_UP: Final = "touched_up"
"""The system of `merge.touch_up`."""


class ScalingSearch(Section):
    """The search for the scaling coefficients on the validation split; the test split is not read for it."""

    search: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """The coefficients to try first, one for the whole model. None: 0.25, 0.5, 0.75, 1, 1.5 and 2 times the method's
    own (`lors merge --list`), which is 0.4 for sums."""
    per: Literal["model", "part", "expert"] = "model"
    """part: encoder and decoder, or expert: each expert, is then given a coefficient of its own, one after the other
    (coordinate descent): the best so far times each of `factors`."""
    factors: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.5, 0.75, 1.25, 1.5)
    """What `per` multiplies a coefficient with."""
    rounds: PositiveInt = 1
    """How often `per` goes through all encoders and decoders, or experts."""
    budget: PositiveInt | None = None
    """The most points scored; None: all of them."""
    metric: Literal["score", "loss", "wer", "cer", "bleu", "chrf"] = "score"
    """What decides: score is the mean of WER (CER where words are not spaced) and of 100 - BLEU over languages and
    tasks; loss the mean of the teacher-forced cross-entropies; the others that metric's mean over the languages."""


class TouchUp(Section):
    """A short training of the merged model on all languages and tasks together, as a system of its own."""

    steps: PositiveInt
    """Updates of the weights, of batches that are drawn from all languages and tasks."""
    learning_rate: PositiveFloat | None = None
    """The peak; None: that of `finetune`."""
    scaling: Annotated[float, Field(ge=0)] | None = None
    """The scaling coefficient of the merge that it starts from; None: that of the merged model. A larger one than is
    best without a touch-up keeps more of what experts learned, and the touch-up mends what they do to one another."""
    freeze: tuple[str, ...] = ()
    """What is not trained, as in `finetune`."""
    speech: tuple[Language, ...] | None = None
    """Languages on whose speech the model is held to the base, as in `finetune.preserve`, which says so where this is
    left out: languages to guard, say, and no others, hold those better."""
    validation: Validation | None = None
    """Its own, not that of `finetune`. With `start` the merged model (that at the coefficient of `merge.scaling`, too)
    stays as it is where training it further makes it no better."""


class Added(Section):
    """Languages that are added to the finished model, one after the other, each for the cost of its own expert: its
    task vectors go on top of the touched-up model before it, which is then touched up again, for a short while, on all
    languages so far."""

    languages: tuple[Language, ...] = ()
    """In the order in which they come; the model of the others is merged and touched up first, and stays as it is.
    `lors add-language` lists its language here."""
    scaling: Annotated[float, Field(ge=0)] = 1.0
    """The scaling coefficient of the task vectors of each."""
    steps: NonNegativeInt = 30
    """Updates after each; 0: none."""
    learning_rate: PositiveFloat | None = None
    """The peak; None: the touch-up's."""


class Merge(Section):
    """How the task vectors become one."""

    method: str = "lors"
    """See `lors merge --list`."""
    scaling: Annotated[float, Field(ge=0)] | ScalingSearch = ScalingSearch()
    """The scaling coefficient: a number, or a search."""
    searches: dict[str, ScalingSearch] = {}
    """Searches of single methods, of `compare` too, in place of `scaling`; with as many points as the others have."""
    weights: dict[str, float] = {}
    """Merge weight by expert (`es-transcribe`) or language (`es`), with `finetune.tasks: together` by language; 1 where
    none is given."""
    parameters: dict[str, dict[str, Any]] = {}
    """Parameters by method, as in `{ties: {density: 0.1}}`; also of the methods of `compare`."""
    groups: dict[str, Group] = {}
    """Other settings for named groups of parameters (`lors merge --list`) or glob patterns; a later group wins."""
    touch_up: TouchUp | None = None
    """Train what `method` merged a little further, on all languages and tasks: the system `touched_up`, which is then
    the model that is written. All else is as in `finetune`; with `preserve` it is held to the base, not to what was
    merged."""
    added: Added = Added()
    """Languages that come later than the merge, where there is a `touch_up`."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return known_method(name)

    @field_validator("searches")
    @classmethod
    def _known_searches(cls, searches: dict[str, ScalingSearch]) -> dict[str, ScalingSearch]:
        for name in searches:
            known_method(name)
        return searches

    @pydantic.model_validator(mode="after")
    def _known_parameters(self) -> Merge:
        for method, values in self.parameters.items():
            try:
                make_recipe(known_method(method), values)
            except InputError as error:
                raise ValueError(f"parameters: {error}") from error
        return self


def known_method(name: str) -> str:
    """The name of a merging method; raises ValueError with the nearest one."""
    if name not in METHODS:
        raise ValueError(f"{name!r} is not a merging method{nearest(name, METHODS)}: choose from {', '.join(METHODS)}")
    return name
