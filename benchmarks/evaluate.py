"""Utterances a second of `lors.speech.transcribe` beside `transformers.pipeline`: see benchmarks/README.md.

    python benchmarks/evaluate.py --model whisper-base --corpus speech/es

Both decode greedily in float32, in this process, in turn. The last line printed is one JSON object of ratios and
counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 16)  # utterances, of the pipeline; its best one counts
RESAMPLES = 2000


def utterances(corpus: Path, language: str, limit: int, work: Path) -> list[Any]:
    """The first ones of the manifest test.jsonl as every step reads them."""
    from lors.speech.corpora.manifest import candidates
    from lors.speech.corpus import read_split, write_split

    write_split(candidates(corpus / "test.jsonl"), work / "test.parquet", language=language, limit=limit)
    return read_split(work / "test.parquet")


def by_pipeline(model: Any, processor: Any, spoken: Sequence[Any], language: str, batch: int) -> Callable[[str], Any]:
    """A function that gives the pipeline's texts for a task."""
    from transformers import pipeline

    # Batches need one, and Whisper's own folders do not always name it.
    processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    recognise = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    asked = {"language": language, "num_beams": 1}

    def texts(task: str) -> list[str]:
        audios = ({"raw": u.audio(), "sampling_rate": 16_000} for u in spoken)
        found = recognise(audios, batch_size=batch, generate_kwargs={**asked, "task": task})
        return [one["text"].strip() for one in found]

    return texts


def timed(measure: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = measure()
    return time.perf_counter() - start, found


def measured(arguments: argparse.Namespace, spoken: Sequence[Any]) -> tuple[dict[str, list[float]], Mapping[str, Any]]:
    """Seconds of every repetition, and what was written last, by the name of the run."""
    import torch

    from lors.speech.load import load_model
    from lors.speech.transcribe import transcribe

    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_model(arguments.model, device=device)
    tasks = ("transcribe", "translate") if arguments.both else ("transcribe",)

    def ours(window: str | float, writer: Any = None) -> dict[str, list[str]]:
        found = transcribe(
            model, processor, spoken, language=arguments.language, tasks=tasks, window=window, writer=writer
        )
        return {task: [h.text for h in found if h.task == task] for task in tasks}

    runs: dict[str, Callable[[], dict[str, list[str]]]] = {"lors": lambda: ours("auto")}
    if arguments.full_window:
        runs["lors at 30 s"] = lambda: ours(30.0)
    if arguments.ctranslate2:
        from lors.speech.ctranslate import CTranslate2Writer

        writer = CTranslate2Writer(model, processor, arguments.model, Path(arguments.work) / "ctranslate2")
        runs["lors, ctranslate2"] = lambda: ours("auto", writer)
    for batch in arguments.batches:
        texts = by_pipeline(model, processor, spoken, arguments.language, batch)
        runs[f"pipeline, batch {batch}"] = lambda texts=texts: {task: texts(task) for task in tasks}  # type: ignore[misc]
    transcribe(model, processor, spoken[:1], language=arguments.language, tasks=tasks)  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    written: dict[str, Any] = {}
    for _ in range(arguments.repeat):
        for name, run in runs.items():
            took, written[name] = timed(run)
            seconds[name].append(took)
            print(f"{name:<20}{len(spoken) / took:8.3f} utterances a second", flush=True)
    return seconds, written


def errors(written: Mapping[str, Any], spoken: Sequence[Any], language: str, best: str) -> dict[str, Any]:
    """WER of every run, and ours less the pipeline's best with the interval of a paired bootstrap over utterances."""
    from lors.scoring.metrics import difference, score

    references = [u.text for u in spoken]
    found: dict[str, Any] = {"wer": {}}
    for name, texts in written.items():
        value = score("wer", references, texts["transcribe"], language=language, resamples=1).value
        found["wer"][name] = round(value, 2)
    ours, theirs = written["lors"]["transcribe"], written[best]["transcribe"]
    apart = difference("wer", references, ours, theirs, language=language, resamples=RESAMPLES)
    found["wer_difference"] = [round(number, 2) for number in (apart.value, apart.low, apart.high)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Whisper")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with a manifest test.jsonl")
    parser.add_argument("--language", help="spoken; the corpus' name where it is left out")
    parser.add_argument("--limit", type=int, default=64, help="utterances")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="of the pipeline; its best one counts")
    parser.add_argument("--both", action="store_true", help="both tasks: one encoder pass beside two pipeline runs")
    parser.add_argument("--full-window", action="store_true", help="ours at 30 s too, as the pipeline")
    parser.add_argument("--ctranslate2", action="store_true", help="ours with that backend too")
    arguments = parser.parse_args()
    arguments.language = arguments.language or arguments.corpus.name
    with tempfile.TemporaryDirectory() as arguments.work:
        spoken = utterances(arguments.corpus, arguments.language, arguments.limit, Path(arguments.work))
        seconds, written = measured(arguments, spoken)
    speed = {name: len(spoken) / statistics.median(times) for name, times in seconds.items()}
    best = max((name for name in speed if name.startswith("pipeline")), key=speed.__getitem__)
    figures = {
        "utterances": len(spoken),
        "hours": round(sum(u.seconds for u in spoken) / 3600, 4),
        "tasks": 2 if arguments.both else 1,
        "threads": arguments.threads,
        "utterances_per_second": {name: round(value, 3) for name, value in speed.items()},
        "ratio": {name: round(value / speed[best], 2) for name, value in speed.items() if name.startswith("lors")},
        "beside": best,
        **errors(written, spoken, arguments.language, best),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
