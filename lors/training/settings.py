"""The settings of fine-tuning: the experiment's `finetune` section. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from lors.settings import Language, Section

__all__ = ["LOG", "Augment", "Finetune", "Lora", "Preserve", "SpecAugment", "Validation"]

LOG = "train.jsonl"
"""A line a step, beside the expert."""


class SpecAugment(Section):
    """Masks on the log-mel spectrogram (Park et al. 2019, section 2), set to the utterance's mean."""

    time_masks: NonNegativeInt = 2
    """Masks of consecutive frames."""
    time_seconds: PositiveFloat = 1.0
    """The longest mask; a mask is drawn from 0 to this."""
    time_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The longest mask as a share of the utterance, which the padding is no part of."""
    frequency_masks: NonNegativeInt = 2
    """Masks of consecutive mel bins."""
    frequency_bins: PositiveInt = 27
    """The widest mask; a mask is drawn from 0 to this."""


class Augment(Section):
    """Changes to the training speech, drawn anew for each utterance and epoch; none by default."""

    speed: tuple[Annotated[float, Field(ge=0.5, le=2)], ...] = ()
    """Speed perturbation (Ko et al. 2015): each utterance is resampled by one of these, such as [0.9, 1.0, 1.1]."""
    spec_augment: SpecAugment | None = None
    """Masks on the spectrogram; `{}` takes the defaults."""


class Lora(Section):
    """LoRA experts (Hu et al. 2021): only a low-rank update is trained, then merged into the weights (the `lora`
    extra)."""

    rank: PositiveInt = 32
    """The rank of each update."""
    alpha: PositiveFloat = 64.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the update's input."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    """Ends of the names of the linear layers that get one."""


class Validation(Section):
    """Validation during the training: the best weights are kept, and the training may stop early."""

    every: PositiveInt
    """Steps from one validation to the next; the last step is validated too."""
    metric: Literal["score", "loss"] = "score"
    """score: WER (CER where words are not spaced) to transcribe, 100 - BLEU to translate, decoded as in `evaluate`;
    loss: cross-entropy a token."""
    patience: PositiveInt | None = None
    """Stop after so many validations without a better one; None trains to the end."""
    limit: PositiveInt | None = None
    """The first so many utterances of the split; None takes all."""
    start: bool = False
    """Validate what the training starts from, too, and keep that where no step is better."""


class Preserve(Section):
    """Keep what the base writes under other prompts (learning without forgetting, Li and Hoiem 2016, section 3): each
    utterance is also given the prompt of another task or language, and there the expert is held to the base by the
    Kullback-Leibler divergence of its tokens. An expert that sees one prompt alone learns to write its language
    whatever it is asked for, and such experts do not merge."""

    weight: PositiveFloat = 1.0
    """Of the divergence, beside the cross-entropy of the expert's own prompt."""
    languages: tuple[Language, ...] = ()
    """Whose prompts are taken beside the expert's own language, for half of the utterances; none: all that the base
    knows. Where the experiment's languages are listed, one more language changes the training of all experts."""
    speech: tuple[Language, ...] = ()
    """Languages whose speech the expert is held to the base on too, with their own prompts, for half of the utterances
    (rehearsal; what was written there need not be known); none: on its own language's speech alone."""
    utterances: PositiveInt = 500
    """The first so many of the training split of each language of `speech`."""


class Finetune(Section):
    """How each expert is trained (AdamW)."""

    steps: PositiveInt = 500
    """Updates of the weights."""
    max_hours: PositiveFloat | None = None
    """Stop after so many hours of training, whatever the steps; the schedule then ends with the time. The result
    depends on the machine's speed."""
    learning_rate: PositiveFloat | None = None
    """The peak. None: by the size of the base, 3.75e-5 (tiny) to 5e-6 (large)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up; constant does not."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's, on matrices and convolutions, not on biases and layer norms."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of each target that is spread over the vocabulary."""
    batch_seconds: PositiveFloat = 80.0
    """Utterances times window of a batch, in seconds of audio; one update of the weights."""
    accumulate: PositiveInt = 1
    """Parts that a batch is computed in, one after the other: the same update for less memory."""
    clip: PositiveFloat = 1.0
    """The largest gradient norm."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""
    freeze: tuple[str, ...] = ()
    """What is not trained: groups (encoder, decoder, embeddings, positions, convolutions, vectors) or glob patterns of
    parameters, such as `model.encoder.*`."""
    lora: Lora | None = None
    """Train LoRA updates instead of the weights; `{}` takes the defaults."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, such as 0.999, which is what is validated and saved."""
    validation: Validation | None = None
    """Selection and early stopping; None trains to the end and keeps the last weights."""
    tasks: Literal["own", "together"] = "own"
    """own: an expert is trained on its own task. together: the experts of a language are one training on all its tasks,
    with the updates of all of them, and one task vector: those of one language's tasks are what gets in each other's
    way most."""
    preserve: Preserve | None = None
    """Hold experts to the base under other prompts, so that they merge; `{}` takes the defaults. The baselines are
    trained without."""
    augment: Augment = Augment()
    """Changes to the training speech."""
    sampling_temperature: Annotated[float, Field(ge=1)] = 1.0
    """Where languages or tasks are mixed, each is drawn in proportion to its utterances to the power of 1 / this: 1
    takes them as they are, 5 lifts small ones."""
    window: Literal["auto"] | PositiveFloat = "auto"
    """Seconds the encoder takes. auto: the longest utterance of the batch + 1 s, at least 5 s, for a 30 s base (a
    Moonshine: just the longest utterance)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 autocast on GPUs that have it, fp32 elsewhere. fp16 scales the loss."""
    compile: bool = False
    """torch.compile: worth its minutes of compiling in long trainings on GPUs."""
    seed: NonNegativeInt = 0
    """Of the order of the batches and of all that is drawn; the same for all experts."""

    def identity(self) -> dict[str, Any]:
        """What a training depends on beside its parts, JSON values; what is new since the first release is left out
        where it is not set, so that what was trained before is found again."""
        found = self.model_dump(mode="json", exclude={"tasks"})
        if self.preserve is None:
            del found["preserve"]
        elif not self.preserve.speech:
            del found["preserve"]["speech"], found["preserve"]["utterances"]
        if self.validation is not None and not self.validation.start:
            del found["validation"]["start"]
        return found

    @property
    def training_window(self) -> float | str:
        """For `lors.speech.features.window_for`: training fits speech more tightly than decoding may."""
        return "tight" if self.window == "auto" else self.window

    @field_validator("freeze")
    @classmethod
    def _no_empty_pattern(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if "" in patterns:
            raise ValueError("'' is no pattern of parameters")
        return patterns
