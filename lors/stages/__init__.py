"""What each step computes: files in, files out, figures back. Run in a child process by `lors.steps.run_step`.

Every stage takes `settings` (its part of the key), `inputs` (input name to folder), `places` (of what is not in the
store), `digests` (of all inputs), `out` (an empty folder for its files), `work` (survives a crash), `threads`, and
`report` for progress; it returns the summary that the manifest keeps.
"""

from lors.stages.data import keep_base, prepare_split
from lors.stages.diagnosing import diagnose_experts
from lors.stages.evaluating import evaluate_model
from lors.stages.merging import (
    add_task_vectors,
    combine_task_vectors,
    extract_task_vector,
    prune_task_vector,
    score_scaling,
    select_scaling,
    write_model,
)
from lors.stages.scoring import score_comet, score_systems
from lors.stages.training import fine_tune, touch_up

__all__ = [
    "add_task_vectors",
    "combine_task_vectors",
    "diagnose_experts",
    "evaluate_model",
    "extract_task_vector",
    "fine_tune",
    "keep_base",
    "prepare_split",
    "prune_task_vector",
    "score_comet",
    "score_scaling",
    "score_systems",
    "select_scaling",
    "touch_up",
    "write_model",
]
