"""What a training goes on from after it was killed: one safetensors file, replaced atomically, and the log."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lors.errors import InputError, TrainingError
from lors.training.examples import Example
from lors.training.settings import LOG, Finetune
from lors.training.weights import Parameters

__all__ = ["LOG", "Best", "Checkpoint", "Log", "Progress", "State", "about", "disk_errors"]

_CHECKPOINT, _BEST = "checkpoint.safetensors", "best.safetensors"
# A checkpoint costs time: at most one a minute, and never more than 5 % of the time spent training.
_SECONDS, _SHARE = float(os.environ.get("LORS_CHECKPOINT_SECONDS", "60")), 0.05


@dataclass(slots=True)
class Progress:
    """How far a training is; JSON values."""

    step: int = 0
    """Finished updates."""
    seconds: float = 0.0
    """Of training, those before a resume included."""
    skipped: int = 0
    """Updates that overflowed fp16 and changed nothing."""
    validated: int = -1
    """The step of the last validation; -1 before the first."""
    best_step: int | None = None
    best_value: float = 0.0
    without_better: int = 0
    """Validations since the best one."""
    split: int = 1
    """How many times more parts than `accumulate` a batch is computed in: doubled where the memory ran out."""
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class State:
    """All that a training changes."""

    parameters: Parameters
    optimizer: torch.optim.Optimizer
    averages: Mapping[str, Tensor]
    """Moving averages by parameter; empty where there are none."""
    scaler: torch.amp.GradScaler
    progress: Progress

    def chosen(self) -> Mapping[str, Tensor]:
        """The weights that count: the averages, where there are any."""
        return self.averages or {name: parameter.detach() for name, parameter in self.parameters.items()}


def about(settings: Finetune, examples: Sequence[Example], parameters: Parameters) -> dict[str, Any]:
    """What a checkpoint is of; another training must not go on from it."""
    spoken = hashlib.sha256()
    for example in examples:
        utterance = example.utterance
        spoken.update(json.dumps([utterance.id, utterance.seconds, example.group, example.labels]).encode())
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    return {
        "settings": settings.identity(),
        "training examples": spoken.hexdigest(),
        "trained weights": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
    }


class Checkpoint:
    """Weights, moments, averages and progress in `work`."""

    def __init__(self, work: Path, about: Mapping[str, Any], writes: bool = True) -> None:
        self.path, self._best, self._about = work / _CHECKPOINT, Best(work), dict(about)
        self._writes, self._last, self._cost = writes, time.monotonic(), 0.0

    def load(self, state: State) -> str | None:
        """Put the last checkpoint into `state`, where there is one; a message where it cannot be used.

        Raises InputError where it is of another training.
        """
        if not self.path.exists():
            return None
        try:
            # A file that is cut short is found here: its header says how long it is.
            with safe_open(self.path, framework="pt") as file:
                metadata = {key: json.loads(text) for key, text in file.metadata().items()}
            progress = Progress(**metadata["progress"])
            if progress.best_step is not None:
                self._best.check()
        except (SafetensorError, OSError, AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            reason = " ".join(str(error).split())
            return f"{self.path} cannot be used ({reason}): the training starts from its beginning"
        self._require_same(metadata["about"])
        with safe_open(self.path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                _put(state, key, file.get_tensor(key))
        state.progress = progress
        state.scaler.load_state_dict(progress.scaler)
        return None

    def _require_same(self, other: Mapping[str, Any]) -> None:
        if differing := [what for what, value in self._about.items() if value != other.get(what)]:
            what = differing[0]
            if what == "settings":
                own = self._about[what]
                what = ", ".join(f"finetune.{key}" for key, value in own.items() if value != other[what].get(key))
            raise InputError(
                f"{self.path} is of another training, whose {what} differ: give another work folder, or delete this "
                "one to train from the beginning"
            )

    def due(self) -> bool:
        return time.monotonic() - self._last >= max(_SECONDS, self._cost / _SHARE)

    def save(self, state: State) -> None:
        """Nothing where a weight is not finite: the checkpoint before stays."""
        if not self._writes or not all(bool(torch.isfinite(p).all()) for p in state.parameters.values()):
            return
        start = time.monotonic()
        tensors: dict[str, Tensor] = {}
        for name, parameter in state.parameters.items():
            tensors[f"weight/{name}"] = parameter.detach()
            for kind, value in state.optimizer.state[parameter].items():  # its own step count, exp_avg and exp_avg_sq
                tensors[f"{kind}/{name}"] = value
        tensors |= {f"average/{name}": value for name, value in state.averages.items()}
        state.progress.scaler = state.scaler.state_dict()
        _write(self.path, tensors, {"progress": asdict(state.progress), "about": self._about})
        self._last, self._cost = time.monotonic(), time.monotonic() - start


def _put(state: State, key: str, tensor: Tensor) -> None:
    kind, _, name = key.partition("/")
    parameter = state.parameters[name]
    if kind == "weight":
        parameter.data.copy_(tensor)
    elif kind == "average":
        state.averages[name].copy_(tensor)
    else:  # a fused optimizer wants its step on the parameter's device too
        state.optimizer.state[parameter][kind] = tensor.to(parameter.device)


class Best:
    """The weights of the best validation.

    Written before the checkpoint that knows of it: a training that was killed in between finds them again.
    """

    def __init__(self, work: Path) -> None:
        self.path = work / _BEST

    def save(self, values: Mapping[str, Tensor], step: int, value: float) -> None:
        _write(self.path, values, {"step": step, "value": value})

    def load(self, parameters: Parameters) -> tuple[int, float]:
        """Put them into the parameters; their step and value."""
        with safe_open(self.path, framework="pt") as file:
            for name, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(name))
            return int(file.metadata()["step"]), float(file.metadata()["value"])

    def check(self) -> None:
        """Raises OSError or SafetensorError where they are missing or damaged."""
        with safe_open(self.path, framework="pt"):
            pass


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".partial")
    try:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={key: json.dumps(value) for key, value in metadata.items()},
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Log:
    """A JSON line a step and a validation, the same for the same training."""

    def __init__(self, work: Path, progress: Progress) -> None:
        """Drops the lines of what a resumed training does again, and the half line that a full disk may leave."""
        path = work / LOG
        if path.exists():
            kept = 0
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n") or not _is_done(json.loads(line), progress):
                    break
                kept += len(line)
            os.truncate(path, kept)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


def _is_done(entry: Mapping[str, Any], progress: Progress) -> bool:
    done: bool = entry["step"] <= (progress.step if "loss" in entry else progress.validated)
    return done


@contextlib.contextmanager
def disk_errors(work: Path) -> Iterator[None]:
    """Inside, a disk without room is a TrainingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingError(
            f"the training's checkpoint and log could not be written to {work} ({error}): free some space and run the "
            "same command again, it goes on from the last checkpoint"
        ) from error
