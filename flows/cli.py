"""The command line: `lors run | sweep | add-language | remove-language | plan | doctor`, and those of the other modules
here. Only those that compute import Prefect."""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flows import checkpoints, data, evaluation, services, versions
from lors.errors import InputError, LorsError

if TYPE_CHECKING:
    from lors.config import Experiment
    from lors.sweep import Variant

__all__ = ["main"]

_DESCRIPTION = """\
One multilingual Whisper, better in the languages you choose: fine-tune an expert a (language, task), prune the task
vectors to a low-rank plus a sparse part (LoRS), merge them into the base, evaluate against every baseline."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 (failed), 2 (the input is wrong), 130 (Ctrl-C) or 143 (SIGTERM)."""
    options = _parser().parse_args(arguments)
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except InputError as error:
        return _fail(error, 2)
    except LorsError as error:
        return _fail(error, 1)
    except KeyboardInterrupt as stopped:
        print("lors: stopped; finished steps are kept, the same command goes on from here", file=sys.stderr)
        return 143 if isinstance(stopped, _TerminatedError) else 130
    except BrokenPipeError:  # such as `lors plan FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _TerminatedError


def _fail(error: LorsError, code: int) -> int:
    print(f"lors: {error}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lors: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lors", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], summary: str, *examples: str) -> Any:
        made = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="\n".join(["for example:", *(f"  {example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(command=command)
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        return made

    def add_experiment(made: Any) -> None:
        made.add_argument("file", type=Path, metavar="FILE", help="the experiment, a YAML file")
        made.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change a setting, as in prune.density=0.2",
        )

    def add_grid(made: Any, required: bool) -> None:
        made.add_argument(
            "--grid",
            action="append",
            default=[],
            required=required,
            metavar="KEY=VALUE,VALUE",
            help="the values of a setting, as in prune.rank_ratio=0.05,0.1; every combination of several",
        )

    def add_on(made: Any) -> None:
        made.add_argument(
            "--on",
            choices=("local", "workers"),
            help="where models are trained: here, or by the workers of a Prefect server (`lors up`)",
        )

    run = add(
        "run",
        _run,
        "Run the whole pipeline of an experiment; what the store has already is not computed again.",
        "lors run deployments/demo.yaml --set prune.rank_ratio=0.2",
    )
    add_experiment(run)
    add_on(run)
    sweep = add(
        "sweep",
        _sweep,
        "Run an experiment once for every combination of some settings; what they have in common is computed once.",
        "lors sweep deployments/demo.yaml --grid prune.rank_ratio=0.05,0.1 --grid prune.density=0.05,0.1 "
        "--set output=outputs/grid",
        "lors sweep deployments/demo.yaml --grid prune.composition=additive,sequential --set 'seeds=[0, 1, 2]' "
        "--set output=outputs/seeds",
    )
    add_experiment(sweep)
    add_grid(sweep, required=True)
    add_on(sweep)
    for name, command, summary, example in (
        (
            "add-language",
            _add_language,
            "Train one more language's experts, merge and evaluate; the new model is taken where no other got worse.",
            "lors add-language mine.yaml it --corpora '{source: folder, path: data/it}'",
        ),
        (
            "remove-language",
            _remove_language,
            "Merge without one language and evaluate; the new model is taken where no other language got worse.",
            "lors remove-language mine.yaml it",
        ),
    ):
        made = add(name, command, summary, example)
        made.add_argument(
            "file", type=Path, metavar="FILE", help="the experiment, a YAML file; it is changed at the end"
        )
        made.add_argument("language", metavar="LANG", help="Whisper's code of the language")
        made.add_argument(
            "--tolerance",
            type=float,
            metavar="POINTS",
            help="of WER, CER or BLEU that another language may lose (default 1)",
        )
        made.add_argument("--accept", action="store_true", help="take the new model whatever got worse")
        if name == "add-language":
            made.add_argument("--corpora", metavar="YAML", help="where its speech comes from, if not as the others'")
            made.add_argument(
                "--afresh",
                action="store_true",
                help="merge and touch up all languages anew, where this one would be added to the touched-up model",
            )
            add_on(made)
    plan = add(
        "plan",
        _plan,
        "Show every step of an experiment, cached or to do, before anything runs.",
        "lors plan deployments/demo.yaml --set prune.rank_ratio=0.2",
    )
    add_experiment(plan)
    add_grid(plan, required=False)
    doctor = add(
        "doctor",
        _doctor,
        "Check this machine: devices, disk, Prefect API, base, audio decoding.",
        "lors doctor deployments/demo.yaml",
    )
    doctor.add_argument("file", type=Path, metavar="FILE", nargs="?", help="check what this experiment needs, too")
    data.add_commands(add)
    evaluation.add_commands(add)
    versions.add_commands(add)
    services.add_commands(add)
    checkpoints.add_commands(add)
    return parser


def _run(options: argparse.Namespace) -> int:
    from lors.sweep import seed_variants

    experiment = _experiment(options)

    def flow() -> dict[str, Any]:
        from flows.pipeline import full_pipeline

        named = full_pipeline.with_options(flow_run_name=f"full-pipeline {experiment.output}")
        result: dict[str, Any] = named(file=options.file, changes=tuple(options.set))
        return result

    result = _under_prefect(seed_variants(experiment), experiment.output, flow)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print((experiment.output / "table.md").read_text("utf-8").strip())
        computed = len(result["computed"])
        print(f"\n{computed} steps computed, {result['steps'] - computed} cached.")
        models = experiment.output / "model" if experiment.seeds is None else "a folder for each seed"
        print(f"The merged model is in {models}, all results in {experiment.output}, for people in report.html.")
        for advice in result["advice"]:
            print(advice)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from lors.sweep import parse_grid, variants

    experiment = _experiment(options)
    found = variants(options.file, options.set, parse_grid(options.grid))

    def flow() -> dict[str, Any]:
        from flows.pipeline import sweep

        result: dict[str, Any] = sweep(found, experiment.output)
        return result

    result = _under_prefect(found, experiment.output, flow)
    if options.json:
        means = json.loads((experiment.output / "sweep.json").read_text("utf-8"))["means"]
        print(json.dumps({**result, "means": means}, indent=2))
    else:
        print((experiment.output / "table.md").read_text("utf-8").strip())
        computed = len(result["computed"])
        print(f"\n{len(found)} variants: {computed} steps computed, {result['steps'] - computed} cached.")
        print(f"Each has a folder in {experiment.output}; results.csv and report.html there hold them side by side.")
    return 0


def _experiment(options: argparse.Namespace) -> Experiment:
    from lors.config import load_experiment

    if getattr(options, "on", None) is not None:
        options.set.append(f"dispatch={options.on}")
    return load_experiment(options.file, options.set)


def _add_language(options: argparse.Namespace) -> int:
    import yaml

    from lors.changes import with_language
    from lors.yaml_text import read_yaml

    try:
        corpora = None if options.corpora is None else read_yaml(options.corpora)
    except yaml.YAMLError as error:
        raise InputError(f"--corpora {options.corpora!r} is not valid YAML") from error
    if options.corpora is not None and not isinstance(corpora, dict):
        raise InputError(
            f"--corpora {options.corpora!r} is no mapping: say where the speech is as in "
            "'{source: folder, path: data/it}'"
        )
    change = with_language(options.file, options.language, corpora, options.afresh)
    if options.on is not None:
        change = replace(change, after=change.after.model_copy(update={"dispatch": options.on}))

    def flow() -> dict[str, Any]:
        from flows.pipeline import add_language

        own = {
            "corpora": change.after.corpora_of.get(options.language),
            "dispatch": options.on,
            "afresh": options.afresh,
        }
        changed: dict[str, Any] = add_language(options.file, options.language, **_verdict(options), **own)
        return changed

    return _changed(options, change.after, flow)


def _remove_language(options: argparse.Namespace) -> int:
    from lors.changes import without_language

    change = without_language(options.file, options.language)

    def flow() -> dict[str, Any]:
        from flows.pipeline import remove_language

        changed: dict[str, Any] = remove_language(options.file, options.language, **_verdict(options))
        return changed

    return _changed(options, change.after, flow)


def _verdict(options: argparse.Namespace) -> dict[str, Any]:
    """When the new model is taken; what is not given is as the flow has it."""
    given = {} if options.tolerance is None else {"tolerance": options.tolerance}
    return {**given, "accept": options.accept}


def _changed(options: argparse.Namespace, after: Experiment, flow: Callable[[], dict[str, Any]]) -> int:
    from lors.config import load_experiment
    from lors.sweep import seed_variants

    result = _under_prefect(seed_variants(after), after.output, flow)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['table']}\n\n{(after.output / 'table.md').read_text('utf-8').strip()}")
        computed, languages = len(result["computed"]), ", ".join(load_experiment(options.file).languages)
        print(f"\n{computed} of {result['steps']} steps computed; {options.file} now has {languages}.")
        print(f"The merged model is in {after.output / 'model'}; `lors history {after.output}` lists those before it.")
    return 0


def _under_prefect(variants: Sequence[Variant], output: Path, flow: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a flow returns, run with progress."""
    from lors.outputs import require_no_run, require_writable
    from lors.s3_store import open_store
    from lors.steps import plan
    from lors.sweep import build_variants

    require_no_run(variants, output)
    store = open_store(variants[0].experiment.store)
    for folder in (output, store.root):
        require_writable(folder)
    steps, _ = build_variants(variants, store)
    planned = plan(steps, store)

    from flows.prefect_environment import connect, outlast, prepare

    if variants[0].experiment.dispatch == "workers":
        os.environ["PREFECT_API_URL"] = services.server_url()
    prepare(store.root)
    from flows.progress import RunProgress
    from tasks.runtime import LISTENERS

    known = {p.step.name for p in planned if p.cached}
    with RunProgress(len(planned), len(known), known) as progress:
        started = time.monotonic()
        connect()
        progress.say(f"Prefect's API is there after {time.monotonic() - started:.1f} s")
        LISTENERS.append(progress)
        try:
            return outlast(flow, progress.say)
        finally:
            LISTENERS.remove(progress)
            gc.freeze()  # or Python walks all of Prefect's objects several times as it ends, for more than a second


def _plan(options: argparse.Namespace) -> int:
    from lors.s3_store import open_store
    from lors.steps import plan
    from lors.sweep import build_variants, parse_grid, variants

    store = open_store(_experiment(options).store)
    steps, _ = build_variants(variants(options.file, options.set, parse_grid(options.grid)), store)
    planned = plan(steps, store)
    if options.json:
        rows = [
            {"name": p.step.name, "stage": p.step.stage, "cached": p.cached, "reason": p.reason, "seconds": p.seconds}
            for p in planned
        ]
        print(json.dumps({"steps": rows, "to_run": sum(not p.cached for p in planned)}, indent=2))
        return 0
    width = max(len(p.step.name) for p in planned)
    for p in planned:
        state = f"cached   ({p.seconds:.1f} s saved)" if p.cached else f"to run   ({p.reason})"
        print(f"{p.step.name:<{width}}  {state}")
    waiting = sum(not p.cached for p in planned)
    print(f"\n{waiting} of {len(planned)} steps to run, {len(planned) - waiting} cached in {store.root}.")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from lors.doctor import examine

    checks = examine(options.file)
    if options.json:
        print(json.dumps([{"check": c.name, "ok": c.ok, "found": c.found, "next": c.next} for c in checks], indent=2))
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<16} {check.found}")
            if not check.ok:
                print(f"      {'':<16} -> {check.next}")
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
