"""How the starter base was made; run it again with `python -m lors.starter.recipe OUT --work WORK` (resumable).

A Whisper of 1.4 M parameters with its own tokenizer, trained from scratch on the synthetic corpus of all its
languages (transcribe, and translate to English), and stopped while still weak, so that experts have room. Its native
window is 4 s.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lors.speech.corpora import synthetic
from lors.speech.corpus import Candidate, read_split, write_split
from lors.training.settings import Finetune

__all__ = ["TRAINING", "build_config", "build_tokenizer", "main", "prepare", "weights_digest"]

WINDOW_SECONDS = 4
UTTERANCES = {"train": 2000, "validation": 40, "test": 60}  # of each language
VOCABULARY = 900  # byte-level BPE, before the special tokens
SEED = 0
# The share of training utterances that get silence up to the native window, so that one window serves any length.
PADDED_SHARE = 0.2


TRAINING = Finetune(
    steps=3600, learning_rate=1.5e-3, batch_seconds=80.0, weight_decay=0.01, precision="fp32", seed=SEED
)


def build_tokenizer() -> Any:
    """A byte-level BPE of the synthetic sentences, with Whisper's special tokens and all its language codes."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    from transformers import WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    forms = list(synthetic.sentences("train", UTTERANCES["train"], SEED))
    texts = [" " + synthetic.render(form, language) for form in forms for language in synthetic.LANGUAGES]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, min_frequency=2, show_progress=False)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = WhisperTokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        pad_token="<|endoftext|>",
        model_max_length=_POSITIONS,
    )
    special = ["startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm", "startofprev", "nospeech"]
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in (*special, "notimestamps")], True)
    return tokenizer


_POSITIONS = 128


def build_config(tokenizer: Any) -> Any:
    """The starter's WhisperConfig: 1.4 M parameters, encoder positions for 4 s."""
    from transformers import WhisperConfig

    end = tokenizer.eos_token_id
    return WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        num_mel_bins=80,
        max_source_positions=WINDOW_SECONDS * 50,
        max_target_positions=_POSITIONS,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _generation_config(tokenizer: Any, config: Any) -> Any:
    from transformers import GenerationConfig
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(f"<|{name}|>"))

    return GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": token(code) for code in LANGUAGES},
        task_to_id={task: token(task) for task in ("transcribe", "translate")},
        no_timestamps_token_id=token("notimestamps"),
        prev_sot_token_id=token("startofprev"),
        max_length=_POSITIONS,
        return_timestamps=False,
    )


def _padded(candidate: Candidate) -> Candidate:
    rng = random.Random(candidate.id)
    if rng.random() >= PADDED_SHARE:
        return candidate

    def load() -> tuple[np.ndarray, int]:
        samples, rate = candidate.load()
        room = int(WINDOW_SECONDS * rate) - len(samples) - 1
        return np.pad(samples, (0, max(0, int(rng.random() * room)))), rate

    return dataclasses.replace(candidate, load=load)


def _prepare(language: str, folder: Path) -> None:
    for split, count in UTTERANCES.items():
        path = folder / language / f"{split}.parquet"
        if not path.exists():
            # Each language is trained on sentences of its own: with the same ones in all, ten languages repeat every
            # English translation, and the decoder learns them by heart instead of listening.
            seed = SEED + 100 + synthetic.LANGUAGES.index(language) if split == "train" else SEED
            rows: Iterator[Candidate] = synthetic.candidates(language, split, count, seed)
            if split == "train":
                rows = map(_padded, rows)
            write_split(rows, path, language=language, max_seconds=WINDOW_SECONDS, max_rejected=0.2)


def prepare(work: Path) -> dict[tuple[str, str], Path]:
    """The corpora of all languages; the finished ones of an earlier run are kept."""
    folder = work / "corpora"
    # A process a language: its splits share one rejects file.
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        list(pool.map(functools.partial(_prepare, folder=folder), synthetic.LANGUAGES))
    return {(code, split): folder / code / f"{split}.parquet" for code in synthetic.LANGUAGES for split in UTTERANCES}


def weights_digest(folder: Path) -> str:
    """sha256 of the starter's weights file."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Make the starter in OUT: tokenizer, corpora, training, scores, card."""
    parser = argparse.ArgumentParser(prog="python -m lors.starter.recipe", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="corpora and checkpoints; run again to resume")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)

    import torch
    import transformers

    from lors.scoring.metrics import score
    from lors.speech.architecture import architecture_of
    from lors.speech.transcribe import transcribe
    from lors.training.finetune import examples_for, fine_tune

    torch.set_num_threads(options.threads)
    started = time.time()
    paths = prepare(options.work)
    print(f"corpora ready after {time.time() - started:.0f} s", flush=True)

    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    torch.manual_seed(SEED)
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = _generation_config(tokenizer, config)
    extractor = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=WINDOW_SECONDS)
    processor = transformers.WhisperProcessor(extractor, tokenizer)

    architecture = architecture_of(model)
    examples: dict[str, list[Any]] = {"train": [], "validation": []}
    for split, found in examples.items():
        for language in synthetic.LANGUAGES:
            utterances = read_split(paths[language, split])
            for task in ("transcribe",) if language == "en" else ("transcribe", "translate"):
                # The same recording serves both tasks under one id; other languages need another.
                named = [dataclasses.replace(u, id=f"{language}-{u.id}") for u in utterances]
                found += examples_for(named, tokenizer, language, task, config.max_target_positions, architecture)

    def report(event: Any) -> None:
        if event.get("done", 1) % 50 == 0:
            print({k: event[k] for k in ("done", "total", "loss", "learning_rate", "samples_per_second")}, flush=True)

    trained = time.time()
    process = time.process_time()
    result = fine_tune(model, examples["train"], examples["validation"], TRAINING, options.work, report)
    seconds, cpu_seconds = time.time() - trained, time.process_time() - process
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)

    scores: dict[str, dict[str, float]] = {}
    for language in synthetic.LANGUAGES:
        utterances = read_split(paths[language, "test"])
        tasks = ("transcribe",) if language == "en" else ("transcribe", "translate")
        hypotheses = transcribe(model, processor, utterances, language=language, tasks=tasks)
        scores[language] = {}
        for task, metric in zip(tasks, ("wer", "bleu"), strict=False):
            texts = [h.text for h in hypotheses if h.task == task]
            references = [u.target(task) or "" for u in utterances]
            scores[language][metric] = round(score(metric, references, texts, language=language).value, 1)
    card = {
        "what": "the starter base of LoRS: a tiny multilingual Whisper trained from scratch on synthetic speech",
        "made_by": "python -m lors.starter.recipe OUT --work WORK",
        "sha256": weights_digest(options.out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "languages": list(synthetic.LANGUAGES),
        "utterances_a_language": UTTERANCES,
        "training": TRAINING.model_dump(mode="json"),
        "result": result,
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "threads": options.threads,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            **synthetic.generator_versions(),
        },
        "test_scores": scores,
        "licence": "Apache-2.0; trained on speech synthesised by eSpeak NG from Unicode CLDR names",
    }
    (options.out / "starter.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
