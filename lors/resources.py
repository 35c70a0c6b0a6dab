"""How the steps of a run share this machine. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from lors.config import Experiment
from lors.errors import ConfigError

__all__ = ["cores", "devices", "shares"]

_NVIDIA = Path("/proc/driver/nvidia/gpus")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def devices() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(index) for index, _ in enumerate(_NVIDIA.iterdir())] if _NVIDIA.is_dir() else []


def cores() -> int:
    """CPU cores that this process may use: by LORS_CORES, its affinity and its container's quota."""
    if (given := os.environ.get("LORS_CORES", "")).isdecimal():
        return max(1, int(given))
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup of version 2, or "max"
        return count


def shares(experiment: Experiment) -> tuple[int, int, list[str]]:
    """(steps side by side, CPU threads of each process, the CUDA devices of each step in turn).

    One a GPU (or a group of `resources.processes` GPUs); without one, several steps of one thread each beat one step of
    several threads (measured 1.4 to 1.6 times on SVDs), so one a core, up to the number of experts. Raises ConfigError
    where there are GPUs, but not enough for one group.
    """
    found, own = devices(), experiment.resources
    together = own.processes
    if found and len(found) < together:
        raise ConfigError(
            f"resources.processes is {together}, but this process may use {len(found)} GPU{'s' * (len(found) > 1)}: "
            "lower it, or set CUDA_VISIBLE_DEVICES to more"
        )
    groups = [",".join(found[i : i + together]) for i in range(0, len(found) - together + 1, together)]
    side_by_side = len(groups) or max(1, min(cores(), len(experiment.experts)) // together)
    parallel = own.parallel if own.parallel != "auto" else side_by_side
    threads = own.threads if own.threads != "auto" else max(1, cores() // (parallel * together))
    return parallel, threads, groups
