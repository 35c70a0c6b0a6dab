"""What deployments/ holds fits the code: pools, deployments, forms, the pools' templates, compose and Kubernetes."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from prefect.utilities.templating import apply_values

from flows import pipeline, services
from flows.prefect_environment import HEARTBEAT_SECONDS
from lors import lease
from lors.changes import TOLERANCE
from lors.config import Resources
from tasks import dispatch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployments"
DEPLOYMENTS = {own["name"]: own for own in yaml.safe_load((FOLDER / "prefect.yaml").read_text())["deployments"]}
PAGE = (ROOT / "docs" / "production.md").read_text()
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
WRITE_OUTPUTS = {"full-pipeline", "merge-and-evaluate", "add-language", "remove-language"}

FIELDS = {
    "full-pipeline": ["experiment", "file", "dispatch", "changes"],
    "train-expert": ["language", "task", "experiment", "file", "sources"],
    "train-baselines": ["experiment", "sources"],
    "merge-and-evaluate": ["experiment", "file"],
    "add-language": ["file", "language", "corpora", "tolerance", "accept", "dispatch", "afresh"],
    "remove-language": ["file", "language", "tolerance", "accept"],
}


def flow_of(name: str) -> Any:
    module, _, function = DEPLOYMENTS[name]["entrypoint"].rpartition(".")
    return getattr(importlib.import_module(module), function)


def sent_by_the_pipeline() -> set[str]:
    """The `flow/deployment` names in the source of the flows."""
    strings = (
        node.value for node in ast.walk(ast.parse(inspect.getsource(pipeline))) if isinstance(node, ast.Constant)
    )
    return {text for text in strings if isinstance(text, str) and re.fullmatch(r"[a-z-]+/[a-z-]+", text)}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_is_of_a_flow_of_its_own_name_with_parameters_that_the_flow_takes(name: str) -> None:
    flow = flow_of(name)
    assert flow.name == name
    given = DEPLOYMENTS[name].get("parameters", {})
    assert set(given) <= set(FIELDS[name])
    if "file" in given:
        flow.validate_parameters(given | ({"language": "it"} if "language" in FIELDS[name] else {}))
        assert (ROOT / given["file"]).is_file()


def test_trainings_go_to_the_gpus_and_the_pools_are_those_that_lors_up_makes() -> None:
    assert sent_by_the_pipeline() == {"train-expert/train-expert", "train-baselines/train-baselines"}
    pools = {name: own["work_pool"]["name"] for name, own in DEPLOYMENTS.items()}
    assert pools == dict.fromkeys(WRITE_OUTPUTS, "lors-cpu") | dict.fromkeys(
        ("train-expert", "train-baselines"), "lors-gpu"
    )
    source = inspect.getsource(services)
    assert all(f'"{pool}"' in source for pool in set(pools.values()))


def test_failures_of_the_flows_that_write_an_output_are_reported() -> None:
    assert set(services._MAIN_FLOWS) == WRITE_OUTPUTS


@pytest.mark.parametrize("name", sorted(WRITE_OUTPUTS))
def test_of_what_writes_an_output_one_runs_at_a_time_and_the_others_wait(name: str) -> None:
    limit = ConcurrencyLimitConfig.model_validate(DEPLOYMENTS[name]["concurrency_limit"])
    assert (limit.limit, limit.collision_strategy.value) == (1, "ENQUEUE")


def test_the_only_schedule_is_the_full_pipeline_s_and_paused() -> None:
    assert [name for name, own in DEPLOYMENTS.items() if own.get("schedules")] == ["full-pipeline"]
    (own,) = DEPLOYMENTS["full-pipeline"]["schedules"]
    schedule = CronSchedule(cron=own["cron"], timezone=own["timezone"])
    assert not DeploymentScheduleCreate(schedule=schedule, active=own["active"]).active


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_form_of_a_deployment_has_a_readable_sentence_for_each_field(name: str) -> None:
    schema = parameter_schema(flow_of(name))
    assert list(schema.properties) == FIELDS[name]
    for about in schema.properties.values():
        assert re.fullmatch(r"[A-Z].*[.]", about["description"], re.DOTALL), about
        assert "{" not in about["description"]
        assert ":param" not in about["description"]


def test_the_form_explains_every_setting_of_an_experiment_and_offers_the_choices() -> None:
    schema = parameter_schema(pipeline.full_pipeline)
    settings = schema.definitions["Experiment"]["properties"]
    assert [name for name, about in settings.items() if not about.get("description")] == []
    assert schema.properties["dispatch"]["anyOf"][0]["enum"] == ["local", "workers"]
    assert parameter_schema(pipeline.train_expert).properties["task"]["enum"] == ["transcribe", "translate"]
    assert parameter_schema(pipeline.add_language).properties["tolerance"]["default"] == TOLERANCE


GOOD: dict[str, Any] = {
    "base": "starter",
    "languages": ["es"],
    "corpora": {"source": "synthetic"},
    "output": "outputs/x",
}


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("full-pipeline", {"experiment": GOOD | {"prnue": {}}}, "prnue"),
        ("full-pipeline", {"experiment": GOOD | {"languages": []}}, "languages"),
        ("full-pipeline", {"experiment": GOOD, "dispatch": "cloud"}, "local"),
        ("train-expert", {"experiment": GOOD, "language": "spanish!", "task": "transcribe"}, "language"),
        ("train-expert", {"experiment": GOOD, "language": "es", "task": "summarise"}, "task"),
        ("add-language", {"file": "e.yaml", "language": "it", "tolerance": "some"}, "tolerance"),
        ("add-language", {"file": "e.yaml", "language": "it", "corpora": {"source": "radio"}}, "corpora"),
        ("remove-language", {"file": "e.yaml", "language": "it", "accept": "perhaps"}, "accept"),
    ],
)
def test_wrong_parameters_are_refused_before_a_run_begins(name: str, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterTypeError, match=said):
        flow_of(name).validate_parameters(parameters)


def test_right_parameters_are_taken() -> None:
    taken = pipeline.train_expert.validate_parameters({"experiment": GOOD, "language": "es", "task": "transcribe"})
    assert taken["experiment"].languages == ("es",)


def test_the_automation_is_the_one_that_lors_up_makes() -> None:
    (own,) = yaml.safe_load((FOLDER / "automations.yaml").read_text())["automations"]
    automation = AutomationCore.model_validate(own)
    assert isinstance(automation.trigger, EventTrigger)
    assert automation.trigger.within == timedelta(seconds=services._SILENT_SECONDS)
    assert f'name="{automation.name}"' in inspect.getsource(services)
    ends = {"heartbeat", "Completed", "Failed", "Cancelled", "Crashed"}
    assert automation.trigger.expect == {f"prefect.flow-run.{end}" for end in ends}
    assert automation.trigger.after == {"prefect.flow-run.heartbeat"}


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_a_pool_s_template_leaves_no_variable_open_and_names_none_that_is_missing(kind: str) -> None:
    template = json.loads((FOLDER / f"{kind}-pool.json").read_text())
    WorkPoolCreate(name="lors-gpu", type=kind, base_job_template=template)
    known = set(template["variables"]["properties"])
    named = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert named == known
    assert template["variables"]["properties"]["image"]["default"] == "lors"


def test_a_run_s_pod_has_the_shared_folder_the_secret_and_as_many_gpus_as_the_pool_says() -> None:
    template = json.loads((FOLDER / "kubernetes-pool.json").read_text())
    variables = template["variables"]["properties"]
    values = {name: about["default"] for name, about in variables.items() if about.get("default") is not None}
    job = apply_values(template["job_configuration"], values | {"gpus": "2"})
    assert isinstance(job, dict)
    pod = job["job_manifest"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert container["envFrom"] == [{"secretRef": {"name": "lors", "optional": True}}]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"data": "/data", "shared-memory": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)


def test_the_kubernetes_objects_belong_together() -> None:
    found = {(own["kind"], own["metadata"]["name"]): own for own in documents("kubernetes.yaml")}
    template = json.loads((FOLDER / "kubernetes-pool.json").read_text())
    defaults = {name: about.get("default") for name, about in template["variables"]["properties"].items()}
    assert ("PersistentVolumeClaim", defaults["claim"]) in found
    settings = found["ConfigMap", "lors-worker"]["data"]
    assert settings["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == HEARTBEAT_SECONDS
    assert settings["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"] == defaults["namespace"]
    for pool in ("lors-cpu", "lors-gpu"):
        pod = found["Deployment", pool]["spec"]["template"]["spec"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in found
        arguments = pod["containers"][0]["args"]
        assert arguments[arguments.index("--pool") + 1] == pool


def test_the_page_s_job_variables_are_those_of_the_templates_and_its_automation_is_one() -> None:
    blocks = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.+?)^```", PAGE, re.MULTILINE | re.DOTALL)]
    variables = [set(own["work_pool"]["job_variables"]) for own in blocks if "work_pool" in own]
    assert len(variables) == 2
    for own, kind in zip(variables, ("docker", "kubernetes"), strict=True):
        assert own < set(json.loads((FOLDER / f"{kind}-pool.json").read_text())["variables"]["properties"])
    (notify,) = (own for own in blocks if "trigger" in own)
    notify["actions"][0]["block_document_id"] = str(uuid.uuid4())
    automation = AutomationCore.model_validate(notify)
    assert set(notify["trigger"]["match_related"]["prefect.resource.name"]) == set(services._MAIN_FLOWS)
    assert f'name="{automation.name}"' in inspect.getsource(services)


def test_the_page_says_the_numbers_of_the_code() -> None:
    for value in (
        f"| {services._SILENT_SECONDS} s after the last one, every {HEARTBEAT_SECONDS} s |",
        f"| {lease.LEASE_SECONDS:g} s after the last one, every {lease.BEAT_SECONDS:g} s |",
        f"| {dispatch.PENDING_SECONDS:g} s | `LORS_PENDING_SECONDS` |",
        f"waits on, for {dispatch.AWAY_SECONDS / 60:g} minutes",
        f"| {Resources().stall_minutes:g} minutes without a sign |",
        f"({TOLERANCE} by default)",
    ):
        assert value in PAGE


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def test_compose_publishes_on_this_machine_alone_and_has_no_password_of_its_own() -> None:
    text = (FOLDER / "compose.yaml").read_text()
    ports = [port for own in COMPOSE["services"].values() for port in own.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    for own in COMPOSE["services"].values():
        for name, value in own["environment"].items():
            if re.search("PASSWORD|AUTH", name):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
            if re.search("TOKEN|SECRET|ACCESS_KEY", name):
                assert value is None, name
    assert "latest" not in text


def test_compose_starts_things_in_order_and_again_after_a_crash() -> None:
    services_of = COMPOSE["services"]
    for name, own in services_of.items():
        assert own["restart"] == ("no" if name == "deploy" else "unless-stopped")
    assert services_of["server"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert services_of["deploy"]["depends_on"] == {"server": {"condition": "service_healthy"}}
    assert {"healthcheck"} <= services_of["database"].keys() & services_of["server"].keys()
    workers = {name: own for name, own in services_of.items() if name.startswith("worker")}
    for own in workers.values():
        assert own["profiles"]
        assert own["depends_on"] == {"deploy": {"condition": "service_completed_successfully"}}
        command = own["command"]
        assert command[command.index("--limit") + 1] == ("1" if "lors-gpu" in command else "8")


def test_the_image_has_the_pins_of_the_project() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    pinned = (ROOT / "constraints.txt").read_text()
    assert f"torch=={re.search(r'^torch==(.+)$', pinned, re.MULTILINE)[1]}" in text  # type: ignore[index]
    assert text.count("pip install") == text.count("pip install -c constraints.txt")
    assert f"PREFECT_FLOWS_HEARTBEAT_FREQUENCY={HEARTBEAT_SECONDS}" in text
    for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
