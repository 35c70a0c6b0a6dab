"""Transcription and translation of many utterances: one encoder pass for both tasks, batches of similar length.

Shapes: B utterances, P positions of the encoder, d the model's width, N tokens of a prompt.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from lors.errors import InputError
from lors.scoring.robustness import loops
from lors.speech.architecture import FeatureCache, architecture_of
from lors.speech.corpus import Utterance
from lors.speech.packed import packed_linears

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TASKS", "Encoded", "Hypothesis", "Writer", "hypothesis_table", "token_limit", "transcribe"]

TASKS = ("transcribe", "translate")

# Speech is slower than this in the tokens of every script: Georgian, at 2.5 tokens a letter of Whisper's vocabulary,
# and some 12 letters a second, comes nearest. A model that repeats itself is stopped here, not after 448 tokens.
_TOKENS_PER_SECOND = 32
_TOKENS_AT_LEAST = 16

_TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)

_TABLE = dict.fromkeys(("id", "language", "task", "split", "speaker"), "object") | {
    "seconds": "float64",
    "source": "object",
    "reference": "object",
    "hypothesis": "object",
    "window": "float64",
    "tokens": "int64",
    "truncated": "bool",
    "spoken": "object",
    "free": "object",
}


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What a model wrote for one utterance.

    `window` is the seconds its encoder saw; `tokens` counts those written before the end token; `truncated` says that
    there was no end token within the limit, which then equals `tokens`. `spoken` is the language that the model says
    it hears, None where it was not asked or cannot say; `free` is the transcript with that language in the prompt,
    None where `spoken` is, and for translations.
    """

    id: str
    task: str
    text: str
    seconds: float
    window: float
    tokens: int
    truncated: bool
    spoken: str | None = None
    free: str | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the encoder made of a batch, `output.last_hidden_state` (B, P, d) and what goes with it; and the decoder's
    keys and values of it, which the first decoding fills in and all others share."""

    output: Any
    crossed: Any = field(default_factory=DynamicCache)

    def cache(self) -> EncoderDecoderCache:
        """The cache of one decoding."""
        return EncoderDecoderCache(DynamicCache(), self.crossed)

    def rows(self, rows: Sequence[int]) -> Encoded:
        """Those rows of the batch alone."""
        return Encoded(type(self.output)(last_hidden_state=self.output.last_hidden_state[list(rows)]))


class Writer(Protocol):
    """What encodes and decodes; the rest of `transcribe` is the same for all."""

    def encode(self, inputs: Mapping[str, Tensor]) -> Encoded:
        """The encoder's output for its inputs by name, on the model's device."""

    def write(self, encoded: Encoded, prompts: Tensor, limit: int, temperature: float = 0.0) -> list[list[int]]:
        """At most `limit` tokens after each row of `prompts`, (B, N); what follows an end token is of no use. They are
        drawn by torch's generators at a `temperature` above 0.
        """


def token_limit(seconds: float, model_limit: int) -> int:
    """The most tokens that speech of that many seconds can need, at most `model_limit`."""
    return min(model_limit, _TOKENS_AT_LEAST + ceil(_TOKENS_PER_SECOND * seconds))


def transcribe(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    *,
    language: str,
    tasks: Sequence[str] = TASKS,
    window: str | float = "auto",
    beams: int = 1,
    fallback: bool = False,
    batch_seconds: float = 160.0,
    max_new_tokens: int | None = None,
    identify: bool = False,
    cache: FeatureCache | None = None,
    device: torch.device | str | None = None,
    writer: Writer | None = None,
    finished: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Hypothesis]:
    """What a `model` writes for each utterance and task: task by task, the utterances in their given order.

    The same inputs give the same result. Beside floating-point rounding, a hypothesis does not depend on the others
    of its batch, except through the window that the batch's longest utterance asks for.

    Args:
        language: code of the language spoken, also for `translate` (into English).
        window: seconds of the encoder window, or "auto"; Moonshine never hears more than the batch's longest utterance.
        beams: 1 decodes greedily.
        fallback: where the model loops (zlib ratio above 2.4), draw its tokens at temperature 0.2, 0.4, ... 1.0 until
            it does not (Radford et al. 2022, section 4.5), with generators seeded by the utterance's id.
        batch_seconds: the most padded seconds (rows times window) encoded at once; one row always is.
        max_new_tokens: the most tokens written; None takes `token_limit` of each utterance.
        identify: ask the model which language it hears, where it has tokens for languages (Radford et al. 2022,
            section 2.3), and transcribe as that one where it is another.
        cache: features kept from call to call.
        device: where the model is moved to; None leaves it where it is.
        writer: encodes and decodes in place of `model`, which it was made from.
        finished: a file that every finished batch is added to; the batches that it has are not decoded again. It is
            for one model and one set of arguments.
        on_progress: called with (utterances done, all).

    Raises:
        InputError: the model does not take the language or the task, or an utterance is longer than the window or
            too long for the device's memory, alone as well: a batch that does not fit is decoded in smaller parts.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"the task {unknown[0]!r} is unknown; Whisper's tasks are {' and '.join(TASKS)}")
    architecture, tokenizer = architecture_of(model), processor.tokenizer
    start = model.config.decoder_start_token_id
    prompts = {task: [start, *architecture.prefix(tokenizer, language, task)] for task in tasks}
    native = architecture.native_window(model.config)
    batches = _batches(
        utterances, lambda longest: architecture.window_for(model.config, longest, window), native, batch_seconds
    )
    cache = cache or FeatureCache(architecture, model.config, max_bytes=0)
    if device is not None:
        model.to(device)
    found: dict[tuple[str, int], Hypothesis] = {}
    done, parts, earlier = 0, 1, _Finished(finished)
    with _decoding(model, beams) as config, packed_linears(model):
        asked = _Asked(
            language=language,
            prompts=prompts,
            languages=architecture.languages(tokenizer) if identify else {},
            most=architecture.token_limit(model.config) - max(map(len, prompts.values()), default=0),
            max_new_tokens=max_new_tokens,
            fallback=fallback,
        )
        writer = writer or _Transformers(model, config)
        for seconds, rows in batches:
            batch = [utterances[row] for row in rows]
            written = earlier.next([(task, utterance.id) for task in prompts for utterance in batch])
            if written is None:
                with torch.inference_mode(), architecture.windowed(model, seconds):
                    inputs = architecture.collate(model.config, cache.features(batch), seconds)
                    whole = _Batch(batch, inputs, seconds)
                    while (written := _fitting(model, tokenizer, writer, config, asked, whole.split(parts))) is None:
                        torch.cuda.empty_cache()
                        if parts >= len(batch):
                            raise InputError(
                                f"utterance {batch[0].id} ({batch[0].seconds:.1f} s) alone does not fit in the memory "
                                f"of the device with a window of {seconds:g} s and {beams} beam(s): lower the window, "
                                "the beams or the corpus' max_seconds"
                            )
                        parts *= 2  # for the batches after this one too
                earlier.add(written)
            places = [(task, row) for task in prompts for row in rows]
            found.update(zip(places, written, strict=True))
            done += len(rows)
            if on_progress:
                on_progress(done, len(utterances))
    return [found[task, row] for task in prompts for row in range(len(utterances))]


def hypothesis_table(
    hypotheses: Sequence[Hypothesis], utterances: Sequence[Utterance], *, language: str, split: str
) -> pd.DataFrame:
    """Hypotheses beside their references, one row each; those without a reference (no translation known) are left out.

    Columns: id, language, task, split, speaker, seconds, source (the transcript of what is spoken), reference,
    hypothesis, window, tokens, truncated, spoken, free; the last ones as in `Hypothesis`.
    """
    import pandas as pd

    by_id = {utterance.id: utterance for utterance in utterances}
    rows = [
        {"id": h.id, "language": language, "task": h.task, "split": split, "speaker": by_id[h.id].speaker}
        | {"seconds": h.seconds, "source": by_id[h.id].text or None, "reference": reference, "hypothesis": h.text}
        | {"window": h.window, "tokens": h.tokens, "truncated": h.truncated, "spoken": h.spoken, "free": h.free}
        for h in hypotheses
        if (reference := by_id[h.id].target(h.task)) is not None
    ]
    return pd.DataFrame(rows, columns=list(_TABLE), dtype=object).astype(_TABLE)


def _batches(
    utterances: Sequence[Utterance], window_for: Callable[[float], float], native: float, batch_seconds: float
) -> list[tuple[float, list[int]]]:
    """(window, rows) of every batch, the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(utterances)), key=lambda row: (-utterances[row].seconds, row))
    batches: list[tuple[float, list[int]]] = []
    while order:
        longest = utterances[order[0]]
        window = window_for(longest.seconds)
        if longest.seconds > window:
            raise InputError(
                f"utterance {longest.id} lasts {longest.seconds:.1f} s, more than the window of {window:g} s (the "
                f"model takes {native:g} s at most); widen the window or lower the corpus' max_seconds"
            )
        # A row whose own window is much shorter starts a batch of its own: the encoder's time goes with the padding.
        size = 1
        while size < min(len(order), int(batch_seconds / window)):
            if window_for(utterances[order[size]].seconds) < 0.75 * window:
                break
            size += 1
        batches.append((window, order[:size]))
        order = order[size:]
    return batches


class _Finished:
    """Batches in a JSON Lines file, one a line, in their order; from the first line that is not whole it is anew."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._size = path, 0  # bytes of the lines that were taken or added
        self._lines = path.read_bytes().splitlines(keepends=True) if path is not None and path.exists() else []

    def next(self, expected: Sequence[tuple[str, str]]) -> list[Hypothesis] | None:
        """The next batch of the file, where it is there and of these (task, id)s."""
        if not self._lines:
            return None
        line = self._lines.pop(0)
        try:
            found = [Hypothesis(**row) for row in json.loads(line)]
        except (TypeError, ValueError):  # killed while it was written
            found = []
        if not line.endswith(b"\n") or [(h.task, h.id) for h in found] != expected:
            self._lines = []
            return None
        self._size += len(line)
        return found

    def add(self, written: Sequence[Hypothesis]) -> None:
        if self._path is None:
            return
        line = json.dumps([asdict(hypothesis) for hypothesis in written]).encode() + b"\n"
        with self._path.open("ab") as file:
            file.truncate(self._size)
            file.write(line)
        self._size += len(line)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of every batch."""

    language: str
    prompts: Mapping[str, Sequence[int]]  # the tokens before the text, by task
    languages: Mapping[str, int]  # the tokens of those that the model may say it hears; empty: it is not asked
    most: int  # tokens that the model has room for after the prompt
    max_new_tokens: int | None
    fallback: bool  # whether what loops is written again


@dataclass(frozen=True, slots=True)
class _Batch:
    """Utterances that are decoded at once."""

    utterances: Sequence[Utterance]
    inputs: Mapping[str, Tensor]
    window: float

    def split(self, count: int) -> list[_Batch]:
        """At most so many consecutive parts of it, none empty."""
        size = ceil(len(self.utterances) / count)
        return [
            _Batch(
                self.utterances[start : start + size],
                {name: tensor[start : start + size] for name, tensor in self.inputs.items()},
                self.window,
            )
            for start in range(0, len(self.utterances), size)
        ]


def _fitting(
    model: Any, tokenizer: Any, writer: Writer, config: Any, asked: _Asked, parts: Sequence[_Batch]
) -> list[Hypothesis] | None:
    """The hypotheses of a batch's parts, task by task; None where the memory ran out.

    The caller then has no error that would hold what was computed until there.
    """
    try:
        found = [h for part in parts for h in _written(model, tokenizer, writer, config, asked, part)]
    except torch.OutOfMemoryError:
        return None
    tasks = list(asked.prompts)
    return sorted(found, key=lambda hypothesis: tasks.index(hypothesis.task))


def _written(model: Any, tokenizer: Any, writer: Writer, config: Any, asked: _Asked, part: _Batch) -> list[Hypothesis]:
    """The hypotheses of one batch, task by task."""
    batch, inputs, window = part.utterances, part.inputs, part.window
    limits = [
        token_limit(utterance.seconds, asked.most)
        if asked.max_new_tokens is None
        else min(asked.max_new_tokens, asked.most)
        for utterance in batch
    ]

    def write(prompts: Tensor, rows: Sequence[int]) -> list[tuple[str, int, bool]]:
        """(text, tokens, whether it ended) of some rows of the batch."""
        own = [limits[row] for row in rows]
        tokens = writer.write(encoded if len(rows) == len(batch) else encoded.rows(rows), prompts, max(own))
        written = read(tokens, own)
        for place, row in enumerate(rows if asked.fallback else ()):
            for temperature in _TEMPERATURES:
                if not loops(written[place][0]):
                    break
                with _seeded(f"{batch[row].id} {temperature}", model.device):
                    again = writer.write(encoded.rows([row]), prompts[place : place + 1], own[place], temperature)
                (written[place],) = read(again, own[place : place + 1])
        return written

    def read(written: Sequence[list[int]], own: Sequence[int]) -> list[tuple[str, int, bool]]:
        cut = [_until_end(tokens, config, limit) for tokens, limit in zip(written, own, strict=True)]
        texts = tokenizer.batch_decode([tokens for tokens, _ in cut], skip_special_tokens=True)
        return [(text.strip(), len(tokens), ended) for text, (tokens, ended) in zip(texts, cut, strict=True)]

    encoded, rows = writer.encode(inputs), range(len(batch))
    spoken = _spoken(model, encoded, asked.languages) if asked.languages else []
    others = [row for row, heard in enumerate(spoken) if heard != asked.language]
    nothing: list[str | None] = [None] * len(batch)
    found: list[Hypothesis] = []
    for task, prompt in asked.prompts.items():
        written = write(torch.tensor(prompt).expand(len(batch), -1), rows)
        free = [text for text, *_ in written] if spoken and task == "transcribe" else list(nothing)
        if others and task == "transcribe":
            own, ids = asked.languages[asked.language], asked.languages
            prompts = [[ids[spoken[row]] if token == own else token for token in prompt] for row in others]
            for row, (text, *_) in zip(others, write(torch.tensor(prompts), others), strict=True):
                free[row] = text
        found += [
            Hypothesis(utterance.id, task, text, utterance.seconds, window, tokens, not ended, *more)
            for utterance, (text, tokens, ended), *more in zip(batch, written, spoken or nothing, free, strict=True)
        ]
    return found


def _spoken(model: Any, encoded: Encoded, languages: Mapping[str, int]) -> list[str]:
    """The likeliest language after the start token, of each row of the encoder's output."""
    hidden = encoded.output.last_hidden_state
    start = torch.full((len(hidden), 1), model.config.decoder_start_token_id, device=hidden.device)
    logits = model(encoder_outputs=(hidden,), decoder_input_ids=start, past_key_values=encoded.cache()).logits[:, -1]
    codes = list(languages)
    return [codes[place] for place in logits[:, [languages[code] for code in codes]].argmax(-1).tolist()]


@contextlib.contextmanager
def _decoding(model: Any, beams: int) -> Iterator[Any]:
    """Evaluation mode, and a generation config of this call only; yields it."""
    training, own = model.training, model.generation_config
    # `generate` fills what is unset from the model's config, whose max_length would compete with max_new_tokens.
    config = model.generation_config = copy.deepcopy(own)
    config.update(num_beams=beams, do_sample=False, max_length=None, return_dict_in_generate=False)
    model.eval()
    try:
        yield config
    finally:
        model.generation_config = own
        model.train(training)


@contextlib.contextmanager
def _seeded(text: str, device: torch.device) -> Iterator[None]:
    """Torch's generators of the CPU and of the device, seeded by a text; they are as before afterwards."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))
        yield


@dataclass(frozen=True, slots=True)
class _Transformers:
    """Transformers' own `generate`, on the model's device."""

    model: Any
    config: Any

    def encode(self, inputs: Mapping[str, Tensor]) -> Encoded:
        model = self.model
        moved = {n: t.to(model.device, model.dtype if t.is_floating_point() else None) for n, t in inputs.items()}
        return Encoded(model.get_encoder()(moved.pop(model.main_input_name), **moved))

    def write(self, encoded: Encoded, prompts: Tensor, limit: int, temperature: float = 0.0) -> list[list[int]]:
        from transformers import GenerationMixin

        hidden, config = encoded.output.last_hidden_state, copy.copy(self.config)
        config.max_new_tokens = limit
        if temperature:
            config.update(num_beams=1, do_sample=True, temperature=temperature, top_k=0)
        # Beams multiply and reorder the rows of their cache.
        shared = {"past_key_values": encoded.cache()} if config.num_beams == 1 else {}
        # Whisper's own `generate` splits what it gets at timestamp tokens, which a weak model may write, and then drops
        # the rest; the plain one keeps every token. It expands the encoder's output in place, hence one holder a call.
        written = GenerationMixin.generate(
            self.model,
            encoder_outputs=copy.copy(encoded.output),
            attention_mask=hidden.new_ones(hidden.shape[:2], dtype=torch.long),  # of the encoder; quiets a warning
            decoder_input_ids=prompts.to(hidden.device),
            generation_config=config,
            **shared,
        )
        tokens: list[list[int]] = written[:, prompts.shape[1] :].tolist()
        return tokens


def _until_end(tokens: list[int], config: Any, limit: int) -> tuple[list[int], bool]:
    """The tokens before the end token, and whether one came within `limit`."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for number, token in enumerate(tokens[:limit]):
        if token in ends:
            return tokens[:number], True
    return tokens[:limit], False
