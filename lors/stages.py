"""What each step computes: files in, files out, figures back. Run in a child process by `lors.pipeline.run_step`.

Every stage takes `settings` (its part of the key), `inputs` (input name to folder), `places` (of what is not in the
store), `digests` (of all inputs), `out` (an empty folder for its files), `work` (survives a crash), `threads`, and
`report` for progress; it returns the summary that the manifest keeps.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors.store import write_json

if TYPE_CHECKING:
    from lors.speech.corpus import Utterance
    from lors.training.examples import Example
    from lors.training.settings import Finetune

__all__ = [
    "combine_task_vectors",
    "evaluate_model",
    "extract_task_vector",
    "fine_tune",
    "prepare_split",
    "prune_task_vector",
    "score_scaling",
    "score_systems",
    "select_scaling",
    "write_model",
]

Report = Callable[[Mapping[str, Any]], None]

_VECTOR = "task_vector.safetensors"
_HYPOTHESES = "hypotheses.parquet"


def prepare_split(
    settings: Mapping[str, Any], places: Mapping[str, Any], out: str, report: Report, **_: Any
) -> dict[str, Any]:
    """One validated split of a language, as Parquet with embedded 16 kHz FLAC, and its rejected rows."""
    from dataclasses import asdict

    from lors.speech.corpora.sources import candidates
    from lors.speech.corpus import write_split

    split = settings["split"]
    written = write_split(
        candidates(settings, places),
        Path(out) / f"{split}.parquet",
        language=settings["language"],
        min_seconds=settings["min_seconds"],
        max_seconds=settings["max_seconds"],
        max_rejected=settings["max_rejected"],
        limit=settings["limit"],
        hours=settings.get("hours"),
        on_progress=lambda done, total: report({"done": done, "total": total, "unit": "utterances"}),
    )
    return asdict(written)


def fine_tune(work: str, report: Report, processes: int = 1, **arguments: Any) -> dict[str, Any]:
    """A model trained on one or more (language, task)s, a complete Hugging Face folder in float32.

    Starts from the input `start`, where there is one, else from the base. Several processes share each batch.
    """
    if processes == 1:
        return train(work=work, report=report, **arguments)
    from lors.training.distributed import launch

    return launch("lors.stages:train", {"work": work, **arguments}, processes, report, Path(work))


def train(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    out: str,
    work: str,
    threads: int,
    report: Report,
    **_: Any,
) -> dict[str, Any]:
    """What `fine_tune` does in each of its processes; the first one writes the files."""
    from lors.training import finetune
    from lors.training.curves import tensorboard_writer
    from lors.training.distributed import rank
    from lors.training.settings import Finetune

    own = Finetune.model_validate(settings["finetune"])
    model, processor = _load(inputs.get("start") or places["base"], threads)
    examples, spoken = _examples(settings["parts"], inputs, model, processor, own)
    first, training = rank() == 0, Path(work) / "training"
    curves = tensorboard_writer(Path(places["tensorboard"])) if first and "tensorboard" in places else nullcontext()
    with curves as draw, finetune.stop_on_sigterm() as stop:

        def tell(event: Mapping[str, Any]) -> None:
            report(event)
            if draw is not None:
                draw(event)

        result = finetune.fine_tune(
            model,
            examples["train"],
            examples["validation"],
            own,
            training,
            tell,
            score=_scorer(settings, processor, spoken) if "evaluate" in settings else None,
            stop=stop,
        )
    if first:
        model.save_pretrained(out)
        processor.save_pretrained(out)
        # Copied, not moved: killed from here on, the next run starts from the checkpoint and goes on with this log.
        shutil.copyfile(training / finetune.LOG, Path(out) / finetune.LOG)
    counts = {f"{split}_examples": len(found) for split, found in examples.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux; the process trains this model alone
    return {**counts, **result, "peak_memory_gib": round(peak / 2**20, 2)}


def _examples(
    parts: Sequence[tuple[str, str]], inputs: Mapping[str, str], model: Any, processor: Any, own: Finetune
) -> tuple[dict[str, list[Example]], dict[tuple[str, str], list[Utterance]]]:
    """The examples of each split, and the utterances that each (language, task) is scored on while it is trained."""
    from lors.errors import CorpusError
    from lors.speech.architecture import architecture_of
    from lors.speech.corpus import read_split
    from lors.training.examples import examples_for

    architecture = architecture_of(model)
    limit = own.validation.limit if own.validation is not None else None
    examples: dict[str, list[Example]] = {"train": [], "validation": []}
    spoken: dict[tuple[str, str], list[Utterance]] = {}
    for split, found in examples.items():
        languages = dict.fromkeys(language for language, _ in parts)
        corpora = {code: read_split(Path(inputs[f"{split}-{code}"]) / f"{split}.parquet") for code in languages}
        for language, task in parts:
            utterances = corpora[language]
            if len(languages) > 1:  # two languages may have the same ids, by which features are kept
                utterances = [replace(utterance, id=f"{language}/{utterance.id}") for utterance in utterances]
            new = examples_for(
                utterances, processor.tokenizer, language, task, architecture.token_limit(model.config), architecture
            )
            if not new:
                raise CorpusError(
                    f"no utterance of the {split} split of {language} can be used to {task}: give it "
                    f"{'translations' if task == 'translate' else 'shorter texts'}, or leave {task} out of the tasks"
                )
            found += new
            if split == "validation":
                spoken[language, task] = utterances[:limit]
    return examples, spoken


def _scorer(
    settings: Mapping[str, Any], processor: Any, spoken: Mapping[tuple[str, str], Sequence[Utterance]]
) -> Callable[[Any], float]:
    """The mean error in percent over the parts, decoded as the systems are evaluated."""

    def score(model: Any) -> float:
        errors: dict[str, float] = {}
        for (language, task), utterances in spoken.items():
            decoding = {**settings["evaluate"], "tasks": [task]}
            errors |= _validation_error(model, processor, utterances, language, decoding)
        return sum(errors.values()) / len(errors)

    return score


def extract_task_vector(
    inputs: Mapping[str, str], places: Mapping[str, Any], digests: Mapping[str, str], out: str, **_: Any
) -> dict[str, Any]:
    """Expert minus base, dense, as a delta file."""
    from lors.checkpoint import Checkpoint
    from lors.delta_file import write_dense
    from lors.task_vector import extract

    base, expert = Checkpoint(places["base"]), Checkpoint(inputs["expert"])
    written = write_dense(Path(out) / _VECTOR, extract(base, expert), base_digest=base.digest())
    return {"tensors": len(written.names)}


def prune_task_vector(
    settings: Mapping[str, Any], inputs: Mapping[str, str], out: str, threads: int, **_: Any
) -> dict[str, Any]:
    """LoRS on a task vector: the compact expert."""
    from lors.delta_file import DeltaFile, write
    from lors.prune import PruneSettings, prune_task_vector

    _use(threads)
    vector, own = DeltaFile(Path(inputs["task_vector"]) / _VECTOR), PruneSettings(**settings)
    pruned = write(
        Path(out) / _VECTOR, prune_task_vector(vector.items(), own), base_digest=vector.base_digest, settings=own
    )
    return {"retained_energy": round(pruned.retained_energy, 6), "bytes": pruned.path.stat().st_size}


def combine_task_vectors(
    settings: Mapping[str, Any], inputs: Mapping[str, str], places: Mapping[str, Any], out: str, threads: int, **_: Any
) -> dict[str, Any]:
    """The experts' task vectors as one, before the scaling coefficient."""
    from lors.checkpoint import Checkpoint
    from lors.delta_file import DeltaFile, write_dense
    from lors.merging.engine import Merger
    from lors.merging.recipe import Recipe

    base = Checkpoint(places["base"])
    vectors = {expert: DeltaFile(Path(folder) / _VECTOR) for expert, folder in inputs.items()}
    recipe = Recipe.model_validate(settings["recipe"])
    with Merger(base, vectors, recipe, settings["weights"], workers=threads, scratch=Path(out)) as merger:
        write_dense(Path(out) / _VECTOR, merger.deltas(), base_digest=base.digest())
    return {"experts": len(vectors)}


def score_scaling(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    out: str,
    threads: int,
    report: Report,
    **_: Any,
) -> dict[str, Any]:
    """One point of the search: the error of base + scaling * combined on the validation splits."""
    from lors.speech.corpus import read_split

    model, processor = _load_merged(places["base"], inputs["combined"], settings, threads)
    measure = _validation_loss if settings["metric"] == "loss" else _validation_error
    errors: dict[str, float] = {}
    for number, language in enumerate(settings["languages"]):
        utterances = read_split(Path(inputs[f"corpus-{language}"]) / "validation.parquet")
        errors |= measure(model, processor, utterances, language, settings)
        report({"done": number + 1, "total": len(settings["languages"]), "unit": "languages"})
    row = {"scaling": settings["scaling"], "error": sum(errors.values()) / len(errors), "errors": errors}
    write_json(Path(out) / "point.json", row)
    return {"error": row["error"]}


def _validation_error(
    model: Any, processor: Any, utterances: Sequence[Any], language: str, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Percent: WER (CER where words are not spaced) for transcribe, 100 - BLEU for translate, by `language-task`."""
    from lors.scoring.metrics import LOWER_IS_BETTER, main_metric, score
    from lors.speech.transcribe import transcribe

    hypotheses = transcribe(model, processor, utterances, language=language, **_decoding(settings))
    errors = {}
    for task in settings["tasks"]:
        texts = {h.id: h.text for h in hypotheses if h.task == task}
        pairs = [(reference, texts[u.id]) for u in utterances if (reference := u.target(task)) is not None]
        if pairs:
            references, written = zip(*pairs, strict=True)
            metric, normaliser = main_metric(task, language), settings["normaliser"]
            value = score(metric, references, written, language=language, normaliser=normaliser).value
            errors[f"{language}-{task}"] = value if metric in LOWER_IS_BETTER else 100 - value
    return errors


def _validation_loss(
    model: Any, processor: Any, utterances: Sequence[Any], language: str, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Cross-entropy a token with the right history, by `language-task`."""
    from lors.speech.architecture import architecture_of
    from lors.training.examples import examples_for
    from lors.training.finetune import validation_loss

    architecture, errors = architecture_of(model), {}
    limit = architecture.token_limit(model.config)
    for task in settings["tasks"]:
        examples = examples_for(utterances, processor.tokenizer, language, task, limit, architecture)
        if examples:
            errors[f"{language}-{task}"] = validation_loss(
                model, examples, batch_seconds=settings["batch_seconds"], window=settings["window"]
            )
    return errors


def select_scaling(settings: Mapping[str, Any], inputs: Mapping[str, str], out: str, **_: Any) -> dict[str, Any]:
    """The scaling coefficient with the least validation error (the smaller of equals), or the one that was set."""
    points = [json.loads((Path(folder) / "point.json").read_text()) for folder in inputs.values()]
    chosen = settings["scaling"] if not points else min(points, key=lambda p: (p["error"], p["scaling"]))["scaling"]
    curve = sorted(points, key=lambda p: float(p["scaling"]))
    write_json(Path(out) / "scaling.json", {"scaling": chosen, "points": curve})
    return {"scaling": chosen}


def write_model(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    digests: Mapping[str, str],
    out: str,
    **_: Any,
) -> dict[str, Any]:
    """The merged model: a complete Hugging Face folder in the base's dtypes."""
    from lors.checkpoint import Checkpoint
    from lors.merging import get_method
    from lors.model_writer import write_model_folder

    scaling = json.loads((Path(inputs["scaling"]) / "scaling.json").read_text())["scaling"]
    method = get_method(settings["method"])
    base = Checkpoint(places["base"])
    written = write_model_folder(
        Path(out),
        base,
        _merged(places["base"], inputs["combined"], {**settings, "scaling": scaling}),
        title=f"Merged by {method.name}",
        text=f"`{method.formula}` with scaling coefficient {scaling:g} ({method.reference}).",
        provenance={"method": method.name, "scaling": scaling, "digests": dict(digests)},
    )
    return {"scaling": scaling, "parameters": written.parameters}


def evaluate_model(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    out: str,
    threads: int,
    report: Report,
    **_: Any,
) -> dict[str, Any]:
    """Every hypothesis of one model on one language's split, beside its reference."""
    from lors.speech.corpus import read_split
    from lors.speech.transcribe import hypothesis_table, transcribe

    model, processor = _load(inputs.get("model") or places["base"], threads)
    language, split = settings["language"], settings["split"]
    utterances = read_split(Path(inputs["corpus"]) / f"{split}.parquet")
    hypotheses = transcribe(
        model,
        processor,
        utterances,
        language=language,
        on_progress=lambda done, total: report({"done": done, "total": total, "unit": "utterances"}),
        **_decoding(settings),
    )
    table = hypothesis_table(hypotheses, utterances, language=language, split=split)
    table.to_parquet(Path(out) / _HYPOTHESES, index=False)
    return {"hypotheses": len(table)}


def score_systems(settings: Mapping[str, Any], inputs: Mapping[str, str], out: str, **_: Any) -> dict[str, Any]:
    """results.csv, the summary by system, and the table, from the hypotheses of `SYSTEM-...` inputs."""
    import pandas as pd

    from lors.scoring.results import markdown_table, score_tables, summarise

    parts: dict[str, list[Any]] = {}
    for name in settings["order"]:
        parts.setdefault(name.partition("-")[0], []).append(pd.read_parquet(Path(inputs[name]) / _HYPOTHESES))
    tables = {system: pd.concat(found, ignore_index=True) for system, found in parts.items()}
    results = score_tables(tables, normaliser=settings["normaliser"])
    summary = summarise(results, tables, guard=settings["guard"], normaliser=settings["normaliser"])
    results.to_csv(Path(out) / "results.csv", index=False)
    write_json(Path(out) / "summary.json", summary)
    (Path(out) / "table.md").write_text(markdown_table(results, summary), encoding="utf-8")
    for system, table in tables.items():
        table.to_parquet(Path(out) / f"hypotheses-{system}.parquet", index=False)
    return {"systems": list(tables)}


def _use(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def _load(folder: str, threads: int) -> tuple[Any, Any]:
    """The model in float32 on this child's device, and its processor."""
    from lors.speech.load import load_model

    _use(threads)
    return load_model(Path(folder), device=_device())


def _device() -> str:
    """This process's GPU: with several, each process of a training has its own."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _load_merged(base: str, combined: str, settings: Mapping[str, Any], threads: int) -> tuple[Any, Any]:
    """What `_load` gives of the folder that `write_model` makes, without writing it."""
    model, processor = _load(base, threads)
    merged = {name: tensor.float() for name, tensor in _merged(base, combined, settings)}
    odd = model.load_state_dict(merged, strict=False).unexpected_keys
    assert not odd, f"the search would score a model without its merged {odd[0]}"
    return model, processor


def _merged(base: str, combined: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, base + scaling * delta in the base's dtype) for every float tensor: the search and the result share it."""
    from lors.checkpoint import Checkpoint
    from lors.delta_file import DeltaFile
    from lors.merging.recipe import Recipe
    from lors.task_vector import apply

    checkpoint, vector = Checkpoint(base), DeltaFile(Path(combined) / _VECTOR)
    recipe = Recipe(scaling=settings["scaling"], groups=settings["groups"])
    for name in checkpoint.float_names:
        scaling = recipe.scaling_of(name, checkpoint.shape(name))
        yield name, apply(checkpoint.tensor(name), vector.delta(name), scaling)


def _decoding(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("tasks", "window", "beams", "batch_seconds")}
