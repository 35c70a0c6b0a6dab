"""Speed, quality, input and memory of fine-tuning beside the usual Hugging Face recipe: see benchmarks/README.md.

    python benchmarks/finetune.py --base whisper-base --corpus speech/es --out bench-finetune

Every training and every decoding runs in a process of its own; what is finished is kept in --out and not done again.
The last line printed is one JSON object of ratios and counts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merge import Runs, gigabytes, machine, run

PARTS = ("throughput", "quality", "input", "memory")
SPLITS = ("train", "validation", "test")
SIDES = ("lors", "recipe")
RATE, WARMUP = 2.5e-5, 0.1  # pre-training's peak / 40, for Whisper-base; the share of the steps
WINDOW = 30.0  # seconds, at which quality is scored
RESAMPLES = 2000
WARMING = 1  # steps before the first block that counts
SMALL_LIMIT = 12e9  # bytes
LONGEST_RUN = 24 * 3600  # seconds

Figures = dict[str, Any]


# The parent. It stays small: the kernel's figure for a child's memory starts at its parent's.


@dataclass(frozen=True)
class Results:
    """Finished measurements by name, in a file; one made with other settings is made again."""

    path: Path

    def once(self, name: str, settings: Figures, measure: Callable[[], Figures]) -> Figures:
        kept: Figures = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        if kept.get(name, {}).get("settings") != settings:
            say(name, "starts")
            kept[name] = {"settings": settings, "figures": measure()}
            partial_file = self.path.with_suffix(".partial")
            partial_file.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            partial_file.replace(self.path)
        figures: Figures = kept[name]["figures"]
        return figures


def say(name: str, text: str) -> None:
    print(f"{name:<16}{text}", flush=True)


def command(name: str, arguments: Figures) -> list[str]:
    """A function of this file as a command."""
    return [sys.executable, __file__, name, json.dumps(arguments)]


def child(name: str, arguments: Figures, log: Path) -> Figures:
    """What a function prints last in a process of its own, and the memory that it took, in bytes."""
    runs = Runs()
    run(command(name, arguments), log, runs, LONGEST_RUN)
    if runs.error:
        raise SystemExit(f"{name} failed ({runs.error}): see {log}")
    return {**json.loads(runs.printed), "resident": runs.resident, "anonymous": runs.anonymous}


class Side:
    """A training in a process of its own that stops after each block of steps until it is told to go on."""

    def __init__(self, name: str, arguments: Figures, log: Path) -> None:
        self.log = log
        # The recipe writes no checkpoints either.
        environment = os.environ | {"LORS_CHECKPOINT_SECONDS": "1e9"}
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command(name, arguments),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )

    def said(self) -> Figures:
        """Its next line: when it stops, and when it ends."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a training failed: see {self.log}")
        figures: Figures = json.loads(line)
        return figures

    def go_on(self) -> Figures:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.said()


def in_turn(label: str, settings: Figures, work: Path) -> Figures:
    """Both trainings, block by block in turn: noise of the machine hits both alike."""
    sides = {name: Side(name, {**settings, "work": str(work / name)}, work / f"{name}.log") for name in SIDES}
    blocks: dict[str, list[Figures]] = {name: [] for name in SIDES}
    try:
        about = {name: side.said() for name, side in sides.items()}
        for number in range(settings["blocks"] + 1):
            for name, side in sides.items():
                block = side.go_on()
                if number:  # the first one warms up
                    blocks[name].append(block)
                    speed = block["samples"] / block["seconds"]
                    say(label, f"block {number} of {settings['blocks']}, {name}: {speed:.2f} utterances a second")
        for side in sides.values():
            side.go_on()
            side.process.wait()
    finally:
        for side in sides.values():
            side.process.kill()
    return {"about": about, "blocks": blocks, "finished": time.time()}


def speeds(found: Figures) -> Figures:
    """Utterances a second of both sides, and ours over the recipe's: of the medians, block by block, and of all
    utterances a second of CPU time, which others on the machine disturb less."""
    each = {name: [block["samples"] / block["seconds"] for block in found["blocks"][name]] for name in SIDES}
    medians = {name: statistics.median(values) for name, values in each.items()}
    pairs = [ours / theirs for ours, theirs in zip(each["lors"], each["recipe"], strict=True)]
    total = {name: [sum(block[of] for block in found["blocks"][name]) for of in ("samples", "cpu")] for name in SIDES}
    cpu = {name: samples / seconds for name, (samples, seconds) in total.items()}
    return {
        "times_faster": medians["lors"] / medians["recipe"],
        "least": min(pairs),
        "most": max(pairs),
        "cpu_times_faster": cpu["lors"] / cpu["recipe"],
        **{f"{name}_utterances_a_second": value for name, value in medians.items()},
    }


def throughput(options: argparse.Namespace, shared: Figures, results: Results) -> Figures:
    settings = {**shared, "steps": WARMING + options.blocks * options.block, "block": options.block}
    settings |= {"blocks": options.blocks, "at_least": options.at_least, "save": False}
    measure = partial(in_turn, "throughput", settings, folder(options, "throughput"))
    found = results.once("throughput", settings, measure)
    counts = {f"{name}_samples": found["about"][name]["samples"] for name in SIDES}
    about = found["about"]["lors"]
    return speeds(found) | counts | {key: about[key] for key in ("median_seconds", "median_window")}


def quality(options: argparse.Namespace, shared: Figures, results: Results) -> Figures:
    blocks = (options.steps - WARMING) // options.block
    settings = {**shared, "steps": options.steps, "block": options.block, "blocks": blocks, "at_least": 0.0}
    work = folder(options, "quality")
    found = results.once("quality", settings, partial(in_turn, "quality", {**settings, "save": True}, work))
    written = {}
    for name in ("base", *SIDES):
        model = options.base if name == "base" else work / name / "model"
        arguments = {key: shared[key] for key in ("corpus", "language")} | {"model": str(model)}
        trained = arguments | {"finished": found["finished"] if name in SIDES else 0}
        measure = partial(child, "decode", arguments, work / f"decode-{name}.log")
        written[name] = results.once(f"decode {name}", trained, measure)
    figures = {"steps": options.steps}
    figures |= {key: value for key, value in speeds(found).items() if key.endswith("times_faster")}
    figures |= {f"{name}_samples": found["about"][name]["samples"] for name in SIDES}
    for splits in (SPLITS[1:2], SPLITS[1:]):
        figures |= {f"{'+'.join(splits)} {key}": value for key, value in compare(written, splits, shared).items()}
    return figures


def compare(written: Mapping[str, Figures], splits: Sequence[str], shared: Figures) -> Figures:
    """WER in percent, and ours minus the recipe's with its 95 % paired bootstrap interval over utterances."""
    import jiwer
    import numpy as np

    from lors.scoring.normalise import normalise

    errors, figures = {}, {}
    for name, system in written.items():
        pairs = [[normalise(text, shared["language"], "lors") for text in row] for s in splits for row in system[s]]
        found = [jiwer.process_words(said, heard) for said, heard in pairs]
        errors[name] = np.array([each.substitutions + each.deletions + each.insertions for each in found])
        words = np.array([each.hits + each.substitutions + each.deletions for each in found])
        figures[f"{name}_wer"] = 100 * errors[name].sum() / words.sum()
    draws = np.random.default_rng(0).multinomial(len(words), np.full(len(words), 1 / len(words)), size=RESAMPLES)
    low, high = np.quantile(100 * (draws @ (errors["lors"] - errors["recipe"])) / (draws @ words), [0.025, 0.975])
    figures |= {"difference": figures["lors_wer"] - figures["recipe_wer"], "low": low, "high": high}
    return {name: float(value) for name, value in figures.items()}


def alone(options: argparse.Namespace, shared: Figures, results: Results, size: str, steps: int) -> Figures:
    """Our loop on a model of a size, with its default batches."""
    settings = {key: shared[key] for key in ("base", "corpus", "language")}
    settings |= {"size": size, "steps": steps, "gradient_checkpointing": size == "small"}
    measure = partial(child, "train", settings, folder(options, "alone") / f"{size}.log")
    return results.once(f"train {size}", settings, measure)


def input_pipeline(options: argparse.Namespace, shared: Figures, results: Results) -> Figures:
    found = alone(options, shared, results, "base", options.input_steps)
    return {
        "share": found["input_share"],
        "steps": options.input_steps,
        "samples_a_second": found["samples_per_second"],
    }


def memory(options: argparse.Namespace, shared: Figures, results: Results) -> Figures:
    figures: Figures = {}
    for size, steps in (("base", options.input_steps), ("small", 1)):
        found = alone(options, shared, results, size, steps)
        wanted = f" (wanted: at most {gigabytes(int(SMALL_LIMIT))})" if size == "small" else ""
        say("memory", f"{size}, {steps} steps: peak RSS {gigabytes(found['resident'])}{wanted}")
        figures |= {f"{size}_{kind}_gb": found[kind] / 1e9 for kind in ("resident", "anonymous")}
    return figures | {"small_within_limit": found["resident"] <= SMALL_LIMIT}


def folder(options: argparse.Namespace, name: str) -> Path:
    path: Path = options.out / name
    path.mkdir(parents=True, exist_ok=True)
    return path


# The children. Each prints its figures as its last line.


def prepare(manifests: str, language: str, corpus: str) -> Figures:
    """The manifests of a folder as prepared splits in `corpus`."""
    from lors.speech.corpora.manifest import candidates
    from lors.speech.corpus import write_split

    written = {}
    for split in SPLITS:
        rows = candidates(Path(manifests) / f"{split}.jsonl")
        written[split] = write_split(rows, Path(corpus) / f"{split}.parquet", language=language).utterances
    return written


def decode(model: str, corpus: str, language: str) -> Figures:
    """(said, written) of each utterance of the validation and the test split."""
    from lors.speech.corpus import read_split
    from lors.speech.load import load_model
    from lors.speech.transcribe import transcribe

    loaded, processor = load_model(Path(model))
    found: Figures = {}
    for split in SPLITS[1:]:
        utterances = read_split(Path(corpus) / f"{split}.parquet")
        written = transcribe(loaded, processor, utterances, language=language, tasks=("transcribe",), window=WINDOW)
        found[split] = [(u.text, h.text) for u, h in zip(utterances, written, strict=True)]
    return found


class Turns:
    """Where a training stops for `Side`: after WARMING steps, then after each block."""

    def __init__(self, sizes: Sequence[int], block: int, blocks: int) -> None:  # utterances of each step
        self.sizes, self.stops = sizes, [WARMING + block * number for number in range(blocks + 1)]
        self.step = self.counted = 0
        self.started = self.cpu = 0.0

    def stop(self, figures: Figures) -> None:
        print(json.dumps(figures), file=sys.__stdout__, flush=True)
        sys.stdin.readline()
        self.started, self.cpu = time.perf_counter(), time.process_time()

    def count(self) -> None:
        self.step += 1
        if self.step in self.stops:
            taken = {"seconds": time.perf_counter() - self.started, "cpu": time.process_time() - self.cpu}
            samples = sum(self.sizes[self.counted : self.step])
            self.counted = self.step
            self.stop({"samples": samples, **taken})


def lors(
    base: str,
    corpus: str,
    language: str,
    batch: int,  # utterances of a step; of ours the mean
    steps: int,
    block: int,
    blocks: int,
    at_least: float,  # seconds of an utterance
    save: bool,
    work: str,
) -> Figures:
    """Our loop, whose windows fit their batch."""
    from lors.speech.load import load_model
    from lors.training.finetune import fine_tune

    model, processor = load_model(Path(base))
    examples = examples_of(model, processor, corpus, language, at_least)
    settings, sizes, windows = planned(model, examples, steps, batch)
    turns = Turns(sizes, block, blocks)
    about = {"utterances": len(examples), "samples": sum(sizes), "batch_seconds": settings.batch_seconds}
    about["median_seconds"] = round(statistics.median(e.utterance.seconds for e in examples), 2)
    turns.stop(about | {"median_window": statistics.median(windows)})

    def report(event: Mapping[str, Any]) -> None:
        if "loss" in event:
            turns.count()

    with tempfile.TemporaryDirectory() as training:
        fine_tune(model, examples, [], settings, Path(training), report)
    return saved(model, processor, work, save)


def recipe(
    base: str,
    corpus: str,
    language: str,
    batch: int,
    steps: int,
    block: int,
    blocks: int,
    at_least: float,
    save: bool,
    work: str,
) -> Figures:
    """Seq2SeqTrainer on features padded to 30 s, which are there before the clock starts."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    from lors.speech.load import load_model

    model, processor = load_model(Path(base))
    type(model).accepts_loss_kwargs = False  # else gradients are scaled wrongly where they are accumulated
    model.config.use_cache = False
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)
    data = []
    for utterance in utterances_of(corpus, at_least):
        features = extractor(utterance.audio(), sampling_rate=extractor.sampling_rate).input_features[0]
        data.append({"input_features": features, "labels": tokenizer(utterance.text).input_ids})
    turns = Turns([batch] * steps, block, blocks)

    def collate(rows: Sequence[Figures]) -> Mapping[str, Any]:
        padded = extractor.pad([{"input_features": row["input_features"]} for row in rows], return_tensors="pt")
        ids = tokenizer.pad([{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
        labels = ids.input_ids.masked_fill(ids.attention_mask.ne(1), -100)
        starts = bool((labels[:, 0] == model.config.decoder_start_token_id).all())
        return {**padded, "labels": labels[:, 1:] if starts else labels}

    class InTurn(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.stop({"utterances": len(data), "samples": batch * steps})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.count()

    settings = Seq2SeqTrainingArguments(
        output_dir=str(Path(work) / "trainer"),
        per_device_train_batch_size=batch,
        dataloader_drop_last=True,  # each step has as many utterances
        max_steps=steps,
        learning_rate=RATE,
        warmup_steps=round(WARMUP * steps),
        lr_scheduler_type="linear",
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Seq2SeqTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        data_collator=collate,
        processing_class=processor,
        callbacks=[InTurn()],
    ).train()
    model.config.use_cache = True
    return saved(model, processor, work, save)


def train(base: str, corpus: str, language: str, size: str, steps: int, gradient_checkpointing: bool) -> Figures:
    """Our loop with its default batches, on `base` or on a Whisper with random weights, which take as much memory."""
    from models import config_for
    from transformers import WhisperForConditionalGeneration

    from lors.speech.load import load_model
    from lors.training.finetune import fine_tune
    from lors.training.settings import Finetune

    model, processor = load_model(Path(base))
    if size != "base":
        model = WhisperForConditionalGeneration(config_for(size))
    examples = examples_of(model, processor, corpus, language)
    settings = Finetune(steps=steps, precision="fp32", gradient_checkpointing=gradient_checkpointing)
    with tempfile.TemporaryDirectory() as training:
        figures: Figures = fine_tune(model, examples, [], settings, Path(training))
    return figures


def utterances_of(corpus: str, at_least: float) -> list[Any]:
    from lors.speech.corpus import read_split

    return [u for u in read_split(Path(corpus) / "train.parquet") if u.seconds >= at_least]


def examples_of(model: Any, processor: Any, corpus: str, language: str, at_least: float = 0.0) -> list[Any]:
    from lors.speech.architecture import architecture_of
    from lors.training.examples import examples_for

    architecture = architecture_of(model)
    limit = architecture.token_limit(model.config)
    spoken = utterances_of(corpus, at_least)
    return examples_for(spoken, processor.tokenizer, language, "transcribe", limit, architecture)


def planned(model: Any, examples: Sequence[Any], steps: int, batch: int) -> tuple[Any, list[int], list[float]]:
    """Settings with which `steps` steps hold nearly `steps` x `batch` utterances, never more, and the utterances and
    the window of each step."""
    from lors.speech.architecture import architecture_of
    from lors.training.inputs import Inputs
    from lors.training.settings import Finetune

    settings = Finetune(steps=steps, learning_rate=RATE, warmup=WARMUP, precision="fp32")
    architecture = architecture_of(model)
    speech = Inputs(examples, architecture, model.config, settings.training_window, seed=settings.seed)
    native = architecture.native_window(model.config)
    best: tuple[Any, list[int], list[float]] = (settings, [], [])
    for batch_seconds in range(batch, round(batch * native) + 1):
        plan = list(itertools.islice(speech.forever(batch_seconds, settings.sampling_temperature), steps))
        sizes = [len(draws) for draws in plan]
        if sum(best[1]) < sum(sizes) <= steps * batch:
            longest = [max(examples[draw.index].utterance.seconds for draw in draws) for draws in plan]
            windows = [architecture.window_for(model.config, seconds, settings.training_window) for seconds in longest]
            best = (settings.model_copy(update={"batch_seconds": float(batch_seconds)}), sizes, windows)
    return best


def saved(model: Any, processor: Any, work: str, save: bool) -> Figures:
    if save:
        model.save_pretrained(Path(work) / "model")
        processor.save_pretrained(Path(work) / "model")
    return {"saved": save}


CHILDREN: dict[str, Callable[..., Figures]] = {
    function.__name__: function for function in (prepare, decode, lors, recipe, train)
}


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] in CHILDREN:
        with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints figures of its own
            figures = CHILDREN[sys.argv[1]](**json.loads(sys.argv[2]))
        print(json.dumps(figures), flush=True)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the real Whisper-base")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of train, validation and test.jsonl")
    parser.add_argument("--language", help="of the corpus; without it, the folder's name")
    parser.add_argument("--out", type=Path, required=True, help="folder for models and finished measurements")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch", type=int, default=8, help="utterances of a step")
    parser.add_argument("--block", type=int, default=5, help="steps of one side before it is the other's turn")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each side, for throughput")
    parser.add_argument("--at-least", type=float, default=1.0, help="seconds of an utterance, for throughput")
    parser.add_argument("--steps", type=int, default=40, help="for quality")
    parser.add_argument("--input-steps", type=int, default=20, help="for input, and for the memory of Whisper-base")
    options = parser.parse_args()
    options.base, options.out = options.base.resolve(), options.out.resolve()
    results = Results(folder(options, ".") / "finetune.json")
    print(machine(), flush=True)
    shared = {"language": options.language or options.corpus.resolve().name, "corpus": str(folder(options, "corpus"))}
    prepared = {"manifests": str(options.corpus.resolve()), **shared}
    results.once("corpus", prepared, partial(child, "prepare", prepared, options.out / "corpus" / "log.txt"))
    shared |= {"base": str(options.base), "batch": options.batch}
    parts = {"throughput": throughput, "quality": quality, "input": input_pipeline, "memory": memory}
    ratios: Figures = {}
    for name in options.only:
        figures = parts[name](options, shared, results)
        say(name, json.dumps(figures))
        ratios |= {f"{name} {key}": round(v, 4) if isinstance(v, float) else v for key, v in figures.items()}
    print(json.dumps(ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
