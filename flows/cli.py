"""The command line: `lors run | plan | doctor | merge`. Prefect is imported by `run` alone."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lors.errors import ConfigError, InputError, LorsError

__all__ = ["main"]

_DESCRIPTION = """\
One multilingual Whisper, better in the languages you choose: fine-tune an expert a (language, task), prune the task
vectors to a low-rank plus a sparse part (LoRS), merge them into the base, evaluate against every baseline."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 (failed) or 2 (the input is wrong)."""
    options = _parser().parse_args(arguments)
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except InputError as error:
        return _fail(error, 2)
    except LorsError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("lors: stopped; finished steps are kept, the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # such as `lors plan FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(error: LorsError, code: int) -> int:
    print(f"lors: {error}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lors: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lors", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], summary: str, example: str) -> Any:
        made = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
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

    run = add(
        "run",
        _run,
        "Run the whole pipeline of an experiment; what the store has already is not computed again.",
        "lors run deployments/demo.yaml --set prune.rank_ratio=0.2",
    )
    add_experiment(run)
    plan = add(
        "plan",
        _plan,
        "Show every step of an experiment, cached or to do, before anything runs.",
        "lors plan deployments/demo.yaml --set prune.rank_ratio=0.2",
    )
    add_experiment(plan)
    doctor = add(
        "doctor",
        _doctor,
        "Check this machine: devices, disk, Prefect API, base, audio decoding.",
        "lors doctor deployments/demo.yaml",
    )
    doctor.add_argument("file", type=Path, metavar="FILE", nargs="?", help="check what this experiment needs, too")
    merge = add(
        "merge",
        _merge,
        "Merge fine-tuned checkpoints (or compact experts) into their base; no training, no Prefect.",
        "lors merge --base openai/whisper-small --expert es=runs/es --expert fr=runs/fr --out merged --scaling 0.5",
    )
    _add_merge(merge)
    return parser


def _add_merge(merge: Any) -> None:
    merge.add_argument("--list", action="store_true", help="list the methods and stop")
    merge.add_argument("--base", metavar="MODEL", help="the model the experts were fine-tuned from: folder or hub id")
    merge.add_argument(
        "--expert", action="append", default=[], metavar="[ID=]MODEL", help="a folder, hub id or compact expert; repeat"
    )
    merge.add_argument("--out", type=Path, metavar="FOLDER", help="the merged model; must not exist or be empty")
    merge.add_argument("--method", default="lors", help="see --list (default: lors)")
    merge.add_argument("--scaling", type=float, metavar="LAMBDA", help="scaling coefficient (default: the method's)")
    merge.add_argument("--weight", action="append", default=[], metavar="ID=W", help="merge weight of an expert")
    merge.add_argument("--composition", choices=("additive", "sequential", "low_rank", "sparse"))
    merge.add_argument("--rank-ratio", type=float, metavar="R", help="rank over the shorter side, in (0, 1]")
    merge.add_argument("--density", type=float, metavar="D", help="fraction of entries that the sparse part keeps")
    merge.add_argument("--refinements", type=int, metavar="K", help="alternations of both fits (additive only)")
    merge.add_argument("--vectors", choices=("keep", "drop"), help="1-D tensors")
    merge.add_argument("--include", action="append", metavar="GLOB", help="prune only these parameters; repeat")
    merge.add_argument("--exclude", action="append", metavar="GLOB", help="keep these parameters' deltas whole; repeat")


def _run(options: argparse.Namespace) -> int:
    from lors.config import load_experiment
    from lors.outputs import require_writable
    from lors.pipeline import build_steps, plan
    from lors.store import Store

    experiment = load_experiment(options.file, options.set)
    for folder in (experiment.output, experiment.store):
        require_writable(folder)
    store = Store(experiment.store)
    planned = plan(build_steps(experiment, store), store)

    from flows.prefect_environment import connect, prepare

    prepare(store.root)
    from flows.pipeline import full_pipeline
    from flows.progress import RunProgress
    from tasks.runtime import LISTENERS

    with RunProgress(len(planned), sum(p.cached for p in planned)) as progress:
        started = time.monotonic()
        connect()
        progress.say(f"Prefect's API is there after {time.monotonic() - started:.1f} s")
        LISTENERS.append(progress)
        try:
            result = full_pipeline(experiment)
        finally:
            LISTENERS.remove(progress)
            gc.freeze()  # or Python walks all of Prefect's objects several times as it ends, for more than a second
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print((experiment.output / "table.md").read_text("utf-8").strip())
        print(f"\n{len(result['computed'])} steps computed, {len(planned) - len(result['computed'])} cached.")
        print(f"The merged model is in {experiment.output / 'model'}, all results in {experiment.output}.")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from lors.config import load_experiment
    from lors.pipeline import build_steps, plan
    from lors.store import Store

    experiment = load_experiment(options.file, options.set)
    store = Store(experiment.store)
    planned = plan(build_steps(experiment, store), store)
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


def _merge(options: argparse.Namespace) -> int:
    from lors.merging import METHODS

    if options.list:
        if options.json:
            rows = [{"name": m.name, "formula": m.formula, "reference": m.reference} for m in METHODS.values()]
            print(json.dumps(rows, indent=2))
        else:
            for method in METHODS.values():
                print(f"{method.name}\n    {method.formula}\n    {method.reference}")
        return 0
    for name in ("base", "out"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is missing; see `lors merge --help`")

    from lors.merging.folders import merge_folders

    experts = _named_experts(options.expert)
    with _bar("merging") as advance:
        result = merge_folders(
            _model(options.base),
            experts,
            options.out,
            method=options.method,
            prune=_prune_settings(options),
            scaling=options.scaling,
            weights=_weights(options.weight),
            on_progress=advance,
        )
    facts = {
        "out": str(result.out),
        "method": result.method,
        "scaling": result.scaling,
        "weights": result.weights,
        "parameters": result.parameters,
        "retained_energy": result.retained_energy,
        "digest": result.digest,
        "seconds": round(result.seconds, 2),
    }
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        kept = "".join(f", {name} keeps {energy:.1%} of its energy" for name, energy in result.retained_energy.items())
        print(
            f"merged {len(experts)} experts by {result.method} with scaling {result.scaling:g} into {result.out} "
            f"({result.parameters / 1e6:.1f} M parameters, {result.seconds:.1f} s{kept})"
        )
    return 0


def _model(name: str) -> str | Path:
    from lors.starter import MODEL_FOLDER

    return MODEL_FOLDER if name == "starter" else name


def _named_experts(given: Sequence[str]) -> dict[str, str]:
    experts: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals:
            name, place = Path(text).stem, text
        if name in experts:
            raise InputError(f"--expert: two experts are named {name!r}; name them, such as es={place}")
        experts[name] = place
    return experts


def _weights(given: Sequence[str]) -> dict[str, float]:
    weights = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            weights[name] = float(value)
        except ValueError as error:
            raise InputError(f"--weight {text!r} is not ID=NUMBER, such as es=0.5") from error
    return weights


def _prune_settings(options: argparse.Namespace) -> Any:
    import pydantic

    from lors.prune import PruneSettings

    names = ("composition", "rank_ratio", "density", "refinements", "vectors", "include", "exclude")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        return PruneSettings(**given) if given else None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        setting = str(first["loc"][0]).replace("_", "-") if first["loc"] else "refinements"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--{setting} {first['input'] if first['loc'] else ''}: {message}") from error


def _bar(title: str) -> Any:
    """A context manager that gives `advance(done, total)`: a bar in a terminal, nothing in a log."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def bar() -> Any:
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()


if __name__ == "__main__":
    sys.exit(main())
