"""The cache key, the retries and the task of each stage."""

from __future__ import annotations

import io
import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.schemas.objects import State, StateType
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.serializers import JSONSerializer, PickleSerializer, Serializer

from lors import errors, stages
from lors.isolate import Slots
from lors.steps import VERSIONS, Source, Step, Workspace
from lors.store import Artifact, Store
from tasks.policies import cache_key, can_pass
from tasks.runtime import Runtime, runtime_of, use
from tasks.steps import TASKS, task_for

FIRST = Step("select scaling lors", "select_scaling", {"method": "lors", "scaling": 0.5})
SECOND = Step("combine", "combine_task_vectors", {"weights": {}}, {"es": Source(FIRST.name, ("scaling.json",))})
FLOW_RUN = uuid.uuid4()
RUN = SimpleNamespace(flow_run_id=FLOW_RUN, name="a task", run_count=1)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    (tmp_path / "records").mkdir()
    with Slots(1, 1) as slots:
        made = Runtime(Workspace(Store(tmp_path / "store"), slots, 1), tmp_path / "records")
        with use(FLOW_RUN, made):
            yield made


def make(step: Step, inputs: dict[str, Artifact], store: Store, content: str) -> Artifact:
    digests = step.input_digests(inputs)
    version = VERSIONS[step.stage]
    with store.produce(
        step.stage, step.key(inputs), version=version, settings=step.settings, inputs=digests
    ) as production:
        (production.out / "scaling.json").write_text(content)
        return production.publish({}, 0.0)


def key_of(step: Step, inputs: dict[str, Artifact]) -> str:
    parameters = {"step": step, "inputs": {name: artifact.to_json() for name, artifact in inputs.items()}}
    return cache_key(SimpleNamespace(task_run=RUN), parameters)  # type: ignore[arg-type]


def test_prefect_s_cache_key_is_the_step_s_own(runtime: Runtime) -> None:
    assert key_of(FIRST, {}) == FIRST.key({})
    artifact = make(FIRST, {}, runtime.workspace.store, "0.5")
    assert key_of(SECOND, {"es": artifact}) == SECOND.key({"es": artifact}) != FIRST.key({})


@pytest.mark.parametrize("how", ["damaged", "deleted", "never made"])
def test_prefect_forgets_what_the_store_no_longer_has(how: str, runtime: Runtime) -> None:
    store, key = runtime.workspace.store, FIRST.key({})
    record, other = runtime.records / key, runtime.records / "another"
    other.write_text("{}")
    if how != "never made":
        artifact = make(FIRST, {}, store, "0.5")
        path = store.path(artifact) / "scaling.json"
        record.write_bytes(recorded(artifact.to_json()))
        key_of(FIRST, {})
        assert record.exists()
        path.write_text("0.6") if how == "damaged" else path.unlink()
    record.write_text("{}")
    assert key_of(FIRST, {}) == key
    assert not record.exists()
    assert other.exists()


def recorded(result: Any, serializer: Serializer | None = None) -> bytes:
    """A record as Prefect writes it."""
    metadata = ResultRecordMetadata(serializer=serializer or JSONSerializer(), storage_key="key")
    return ResultRecord(metadata=metadata, result=result).serialize()


class Trap:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["pickle", "call", "another artifact", "no record", "too deep"])
def test_a_record_that_somebody_put_there_is_never_read(how: str, runtime: Runtime, tmp_path: Path) -> None:
    store, mark = runtime.workspace.store, tmp_path / "mark"
    artifact, record = make(FIRST, {}, store, "0.5"), runtime.records / FIRST.key({})
    call = {"__class__": "pathlib.Path.touch", "data": {"self": str(mark)}}
    content = {
        "pickle": recorded(Trap(mark), PickleSerializer()),
        "call": recorded(None).replace(b'"null"', json.dumps(json.dumps(call)).encode()),
        "another artifact": recorded({**artifact.to_json(), "summary": {"scaling": 9}}),
        "no record": b"\x80\x04",
        "too deep": b"[" * 10**6,
    }[how]
    record.write_bytes(content)
    if how == "pickle":  # as the trap would have it
        ResultRecord.deserialize(content)
        assert mark.exists()
        mark.unlink()
    key_of(FIRST, {})
    assert not record.exists()
    assert not mark.exists()


def failed(error: Exception) -> State[Any]:
    return State(type=StateType.FAILED, data=error)


@pytest.mark.parametrize("name", errors.__all__)
def test_what_the_user_must_change_is_not_tried_again(name: str, runtime: Runtime) -> None:
    error = getattr(errors, name)("A sentence.")
    assert can_pass(None, RUN, failed(error)) is (name in ("StepFailedError", "UnreachableError"))


def test_a_network_that_is_away_is_waited_for_longer_than_a_process_that_dies(runtime: Runtime) -> None:
    third = SimpleNamespace(flow_run_id=FLOW_RUN, name="a task", run_count=3)
    assert not can_pass(None, third, failed(errors.StepFailedError("was killed")))
    assert can_pass(None, third, failed(errors.UnreachableError("no answer")))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("odd"), AssertionError()])
def test_the_unforeseen_is_tried_again(error: Exception, runtime: Runtime) -> None:
    assert can_pass(None, RUN, failed(error))


def test_nothing_is_tried_again_in_a_run_that_is_ending(tmp_path: Path) -> None:
    assert not can_pass(None, RUN, failed(errors.StepFailedError("was killed")))
    with pytest.raises(errors.StepFailedError, match="a task was not done, because the run is ending"):
        runtime_of(RUN)


def test_flow_runs_of_one_process_keep_their_own_runtimes(runtime: Runtime) -> None:
    other, run = Runtime(runtime.workspace, Path("elsewhere")), SimpleNamespace(flow_run_id=uuid.uuid4(), name="b")
    with use(run.flow_run_id, other):
        assert runtime_of(RUN) is runtime
        assert runtime_of(run) is other
    assert runtime_of(RUN) is runtime


@pytest.mark.filterwarnings("ignore:Logger 'prefect.flow_runs' attempted")
def test_what_prefect_logs_has_no_secret_in_it(runtime: Runtime) -> None:
    token, said = "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", io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("prefect.flow_runs").addHandler(handler)
    try:
        with use(uuid.uuid4(), runtime):
            pass
        try:
            try:
                raise OSError(f"the server was sent {token}")
            except OSError as error:
                raise errors.LorsError("It failed.") from error
        except errors.LorsError:
            logging.getLogger("prefect.flow_runs").exception("Encountered %r", token)
    finally:
        logging.getLogger("prefect.flow_runs").removeHandler(handler)
    assert "Encountered '***'" in said.getvalue()
    assert "OSError: the server was sent ***" in said.getvalue()
    assert token not in said.getvalue()


@pytest.mark.parametrize("stage", stages.__all__)
def test_each_stage_has_its_task(stage: str) -> None:
    assert set(stages.__all__) == set(VERSIONS) == set(TASKS)
    made = TASKS[stage]
    assert made.fn.__name__ == stage
    assert made.fn.__doc__
    assert made.name == stage.replace("_", "-")
    assert made.task_run_name == "{step.name}"
    assert "lors" in made.tags
    assert len(made.tags) == 2
    step = Step("a step", stage, {}, language="es")
    for task in (made, task_for(step, cached=False), task_for(step, cached=True)):
        assert isinstance(task.cache_policy, CacheKeyFnPolicy)
        assert task.cache_policy.cache_key_fn is cache_key
        assert (task.retries, task.persist_result, task.result_serializer) == (6, True, "json")
        assert task.retry_delay_seconds == [2, 4, 8, 16, 32, 64]
        assert task.retry_condition_fn is can_pass
    assert task_for(step, cached=False).tags == made.tags | {"language:es"}
    assert not task_for(step, cached=True).tags
