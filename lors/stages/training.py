"""Experts, and baselines that are trained on all languages."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lors.stages.common import Report, load
from lors.stages.validating import validation_error

if TYPE_CHECKING:
    from lors.speech.corpus import Utterance
    from lors.training.examples import Example
    from lors.training.preserve import Prompts
    from lors.training.settings import Finetune

__all__ = ["fine_tune", "touch_up", "train"]


def fine_tune(work: str, report: Report, processes: int = 1, **arguments: Any) -> dict[str, Any]:
    """A model trained on one or more (language, task)s, a complete Hugging Face folder in float32.

    Starts from the input `start`, where there is one, else from the base, which it is held to where it is held.
    Several processes share each batch.
    """
    if processes == 1:
        return train(work=work, report=report, **arguments)
    from lors.training.distributed import launch

    return launch("lors.stages.training:train", {"work": work, **arguments}, processes, report, Path(work))


def touch_up(
    work: str,
    report: Report,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    digests: Mapping[str, str],
    out: str,
    **arguments: Any,
) -> dict[str, Any]:
    """The merged model `start`, trained further: a complete folder in its dtypes, with a card and the log.

    The input `merged`, where there is one, is kept instead where it is no worse on validation.
    """
    from lors.checkpoint import Checkpoint, check_compatible
    from lors.model_writer import write_model_folder
    from lors.training.settings import LOG

    trained = Path(work) / "trained"
    shutil.rmtree(trained, ignore_errors=True)
    arguments |= {"settings": settings, "inputs": inputs, "digests": digests}
    result = fine_tune(
        work, report, judged=settings["finetune"].get("validation") is not None, out=str(trained), **arguments
    )
    merged, own = Checkpoint(inputs["start"]), Checkpoint(trained)
    if "merged" in inputs and (value := _value(inputs["merged"], **arguments)) <= result["best_value"]:
        result |= {"best_step": 0, "best_value": round(value, 5), "kept": "merged"}
        own = Checkpoint(inputs["merged"])
    check_compatible(merged, own)
    taught = " and ".join(f"{language}-{task}" for language, task in settings["parts"])
    text = (
        f"A merged model, trained further for {result.get('best_step', result['steps'])} updates on {taught} together."
    )
    if result.get("best_step") == 0:
        text = f"A merged model as it is: training it further on {taught} made it no better on validation."
    write_model_folder(
        Path(out),
        merged,
        ((name, own.tensor(name)) for name in merged.float_names),
        title="Merged and touched up",
        text=text,
        provenance={"touch_up": settings["finetune"], "digests": dict(digests)},
    )
    shutil.copyfile(trained / LOG, Path(out) / LOG)
    return result


def train(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    out: str,
    work: str,
    threads: int,
    report: Report,
    judged: bool = True,  # whether the figures have the loss on the validation splits
    **_: Any,
) -> dict[str, Any]:
    """What `fine_tune` does in each of its processes; the first one writes the files."""
    from lors.training import finetune
    from lors.training.curves import tensorboard_writer
    from lors.training.distributed import rank
    from lors.training.settings import Finetune

    own = Finetune.model_validate(settings["finetune"])
    model, processor = load(inputs.get("start") or places["base"], threads)
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
            examples["validation"] if judged else [],
            own,
            training,
            tell,
            score=_scorer(settings, processor, spoken),
            prompts=_prompts(settings["parts"], inputs, model, processor, own),
            held_to=load(places["base"], threads)[0] if own.preserve is not None and "start" in inputs else None,
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
                if limit is not None:  # of those that can be scored
                    utterances = [utterance for utterance in utterances if utterance.target(task) is not None][:limit]
                spoken[language, task] = utterances
    return examples, spoken


def _value(folder: str, settings: Mapping[str, Any], inputs: Mapping[str, str], threads: int, **_: Any) -> float:
    """What a model is on the validation that the training of these settings has; the lower the better."""
    from lors.training.finetune import validation_measure
    from lors.training.settings import Finetune

    own = Finetune.model_validate(settings["finetune"])
    model, processor = load(folder, threads)
    examples, spoken = _examples(settings["parts"], inputs, model, processor, own)
    measure = validation_measure(own, examples["validation"], _scorer(settings, processor, spoken))
    assert measure is not None, "only what is validated has something to compare with"
    return measure(model.eval())


def _prompts(
    parts: Sequence[tuple[str, str]], inputs: Mapping[str, str], model: Any, processor: Any, own: Finetune
) -> Prompts | None:
    """What the utterances are asked for beside, where the expert is held to the base there."""
    from lors.speech.architecture import architecture_of
    from lors.speech.corpus import read_split
    from lors.training.preserve import Prompts

    if own.preserve is None:
        return None
    architecture = architecture_of(model)
    limit, trained = architecture.token_limit(model.config), [(language, task) for language, task in parts]
    speech = {}
    for language in own.preserve.speech:
        if (folder := inputs.get(f"held-{language}")) is not None:
            found = read_split(Path(folder) / "train.parquet")
            speech[language] = [replace(utterance, id=f"{language}/{utterance.id}") for utterance in found]
    return Prompts(processor.tokenizer, architecture, limit, trained, own.preserve.languages, speech)


def _scorer(
    settings: Mapping[str, Any], processor: Any, spoken: Mapping[tuple[str, str], Sequence[Utterance]]
) -> Callable[[Any], float] | None:
    """The mean error in percent over the parts, decoded as the systems are evaluated; None where no score is wanted."""
    if "evaluate" not in settings:
        return None

    def score(model: Any) -> float:
        errors: dict[str, float] = {}
        for (language, task), utterances in spoken.items():
            decoding = {**settings["evaluate"], "tasks": [task]}
            errors |= validation_error(model, processor, utterances, language, decoding)
        return sum(errors.values()) / len(errors)

    return score
