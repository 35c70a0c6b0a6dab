"""Checks of this machine before hours of work: devices, disk, Prefect's API, the base, audio decoding."""

from __future__ import annotations

import importlib.metadata
import io
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lors.config import Experiment, load_experiment
from lors.errors import LorsError
from lors.resources import cores, devices
from lors.s3_store import S3Store, open_store
from lors.secrets import redact

__all__ = ["Check", "examine"]

_LOW_DISK = 5 << 30
# Outside these, Prefect 3.8 runs no flow (fastapi) or silently creates no scheduled runs (sqlalchemy).
_PINNED = {"fastapi": "0.151", "sqlalchemy": "2.1"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at; `next` says what to do where it is not ok."""

    name: str
    ok: bool
    found: str
    next: str = ""


def examine(file: Path | None = None) -> list[Check]:
    """All checks; with an experiment's file also its base, corpora and folders."""
    experiment: Experiment | None = None
    checks: list[Check] = []
    if file is not None:
        try:
            experiment = load_experiment(file)
            checks.append(Check("experiment", True, f"{file}: {len(experiment.experts)} experts"))
        except LorsError as error:
            checks.append(Check("experiment", False, str(error), "correct the file"))
    for check in (_devices, _prefect, _prefect_api, _audio, _synthesis):
        checks += _guarded(check)
    checks += _guarded(_disk, experiment) + _guarded(_base, experiment)
    if experiment is not None:
        checks += _guarded(_bucket, experiment) + _guarded(_steps, experiment)
    return [replace(check, found=redact(check.found), next=redact(check.next)) for check in checks]


def _guarded(check: Callable[..., Iterator[Check]], *arguments: Any) -> list[Check]:
    found: list[Check] = []
    try:
        found.extend(check(*arguments))
    except Exception as error:  # a check that breaks is a finding, not the end of the others
        name = check.__name__.strip("_").replace("_", " ")
        found.append(Check(name, False, f"{type(error).__name__}: {error}", "see the message"))
    return found


def _devices() -> Iterator[Check]:
    import torch

    found = devices()
    if found and not torch.cuda.is_available():
        advice = "install a CUDA build of torch, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        yield Check("devices", False, f"{len(found)} GPUs, but torch {torch.__version__} cannot use them", advice)
    elif found:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Check("devices", True, f"{names}; torch {torch.__version__}")
    else:
        yield Check("devices", True, f"no GPU, {cores()} CPU cores; torch {torch.__version__}")


def _prefect() -> Iterator[Check]:
    def number(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(".")[:2])

    for name, limit in _PINNED.items():
        version = importlib.metadata.version(name)
        if number(version) >= number(limit):
            yield Check(name, False, f"{name} {version} breaks Prefect 3.8", f"pip install '{name}<{limit}'")
    yield Check("prefect", True, f"prefect {importlib.metadata.version('prefect')}")


def _prefect_api() -> Iterator[Check]:
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        yield Check("prefect api", True, "none set: each run starts one of its own (set PREFECT_API_URL for a server)")
        return
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5) as answer:
            yield Check("prefect api", answer.status == 200, f"{url} answers {answer.status}", "look at the server")
    except (OSError, ValueError, urllib.error.URLError) as error:
        advice = "start it with `prefect server start`, or unset PREFECT_API_URL"
        yield Check("prefect api", False, f"{url} does not answer ({error})", advice)


def _audio() -> Iterator[Check]:
    import numpy as np
    import soundfile
    import soxr

    tone = np.sin(np.arange(48_000) * (2 * np.pi * 440 / 48_000)).astype(np.float32)
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        buffer = io.BytesIO()
        soundfile.write(buffer, tone, 48_000, format=kind)
        buffer.seek(0)
        samples, rate = soundfile.read(buffer, dtype="float32")
        if not 15_000 < len(soxr.resample(samples, rate, 16_000)) < 17_500:
            yield Check("audio", False, f"{kind} decodes to the wrong length", "pip install -U soundfile soxr")
            return
    yield Check("audio", True, "wav, flac, ogg and mp3 decode and resample")


def _synthesis() -> Iterator[Check]:
    from lors.speech.corpora.espeak import VOICES, speak
    from lors.speech.corpora.synthetic import generator_versions

    try:
        generator_versions()
    except LorsError as error:
        yield Check("synthesis", True, f"not installed: {error}")
        return
    samples, rate = speak("Hola", "es", VOICES[0], 170, 50)
    yield Check("synthesis", len(samples) > rate / 5, f"eSpeak NG speaks ({rate} Hz)", "reinstall espeakng-loader")


def _disk(experiment: Experiment | None) -> Iterator[Check]:
    folders = {"folder": Path()}
    if experiment is not None:
        folders = {"store": open_store(experiment.store).root, "output": experiment.output}
    for name, folder in folders.items():
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        enough, writable = free >= _LOW_DISK, existing.is_dir() and os.access(existing, os.W_OK)
        found = f"{name} {folder.absolute()}: {free / 2**30:.1f} GiB free" + ("" if writable else ", not writable")
        yield Check("disk", enough and writable, found, "free space, change permissions or choose another folder")


def _bucket(experiment: Experiment) -> Iterator[Check]:
    try:
        store = open_store(experiment.store)
        if isinstance(store, S3Store):
            store.probe()
            yield Check("bucket", True, f"{store.url} can be listed, read and written, with conditions")
    except LorsError as error:
        yield Check("bucket", False, str(error), "see the message")


def _base(experiment: Experiment | None) -> Iterator[Check]:
    from lors.checkpoint import Checkpoint
    from lors.pipeline import resolve_base

    name = experiment.base if experiment else "starter"
    try:
        checkpoint = Checkpoint(resolve_base(name))
        yield Check("base", True, f"{name}: {checkpoint.parameters / 1e6:.1f} M parameters")
    except LorsError as error:
        yield Check("base", False, str(error), "set `base` to a folder or id that is reachable from here")


def _steps(experiment: Experiment) -> Iterator[Check]:
    from lors.pipeline import build_steps

    try:
        steps = build_steps(experiment, open_store(experiment.store))
        yield Check("corpora", True, f"{len(steps)} steps can be planned")
    except LorsError as error:
        yield Check("corpora", False, str(error), "correct the experiment or the corpus")
