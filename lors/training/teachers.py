"""Knowledge distillation (Hinton et al. 2015): each expert says what its own language and task is answered with.

A merged model is touched up on few updates; what the experts answer says more a token than the transcript alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lors.training.weights import same_weights

__all__ = ["Teachers"]


@dataclass(frozen=True, slots=True)
class Teachers:
    """The models that teach one training."""

    models: Sequence[Any]
    """Each once, in evaluation mode, on the device of the trained one; those with the same encoder share it."""
    places: Sequence[int]
    """Which of them teaches each group, in the order of `Inputs.groups`."""
    share: float
    """Of each target, beside the transcript's."""
    shares_encoder: bool = False
    """Whether the trained model's encoder is theirs too: it is frozen, so its output serves all."""

    @classmethod
    def of(
        cls,
        models: Mapping[str, Any],  # by group
        groups: Sequence[str],
        share: float,
        model: Any,  # that is trained
        frozen: bool,  # whether its encoder is
    ) -> Teachers:
        distinct = list({id(models[group]): models[group] for group in groups}.values())
        first = distinct[0].get_encoder()
        same = all(same_weights(other.get_encoder(), first) for other in distinct[1:])
        for one in distinct:
            one.eval().requires_grad_(False)
            if same:  # and is in memory once
                one.model.encoder = first
        places = [next(k for k, one in enumerate(distinct) if one is models[group]) for group in groups]
        return cls(distinct, places, share, frozen and same and same_weights(model.get_encoder(), first))

    @torch.no_grad()
    def logits(
        self,
        inputs: Mapping[str, Tensor],  # of the trained model
        groups: Tensor,  # (B,), of each utterance
        heard: Tensor,  # (B, positions, width): what the trained model's encoder made of them
    ) -> Tensor:
        """(B, T, V): what the teacher of each utterance writes."""
        taught: Tensor | None = None
        teaching = torch.tensor(self.places, device=groups.device)[groups]
        for place, teacher in enumerate(self.models):
            rows = (teaching == place).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            own: dict[str, Any] = {name: tensor[rows] for name, tensor in inputs.items()}
            if self.shares_encoder:
                own = {"decoder_input_ids": own["decoder_input_ids"], "encoder_outputs": (heard[rows],)}
            found = teacher(**own, use_cache=False).logits
            if taught is None:
                taught = found.new_empty(len(groups), *found.shape[1:])
            taught[rows] = found
        assert taught is not None, "a part has an utterance"
        return taught
