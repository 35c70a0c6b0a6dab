"""What is secret is replaced in every message, and refused in settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lors import errors
from lors.changes import with_language
from lors.config import Experiment, load_experiment, parse_experiment
from lors.doctor import examine
from lors.errors import ConfigError
from lors.isolate import perform
from lors.secrets import redact, secret_setting

HUB = "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"
SETTINGS: dict[str, Any] = {
    "base": "starter",
    "languages": ["es"],
    "corpora": {"source": "synthetic"},
    "output": "out",
    "store": "store",
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"the token {HUB} is bad", "the token *** is bad"),
        ("at https://me:pa:ss@host:80/a@b?x=1.", "at https://***@host:80/a@b?x=1."),
        ("postgresql+asyncpg://lors:pass@db/lors", "postgresql+asyncpg://***@db/lors"),
        ("https://h/a?token=abc&b=1", "https://h/a?token=***&b=1"),
        ("https://h/a?b=1&X-Amz-Signature=0a&X-Amz-Date=1", "https://h/a?b=1&X-Amz-Signature=***&X-Amz-Date=1"),
        ("AKIAABCDEFGHIJKLMNOP and pnu_abcdefghijklmnopqrstuv", "*** and ***"),
        ("Authorization: Bearer abc.def, x", "Authorization: Bearer *** x"),
        ("{'authorization': 'Basic YTpi'}", "{'authorization': 'Basic ***'}"),
        # What only looks like it.
        ("hf://datasets/who/set@0123/es.parquet", "hf://datasets/who/set@0123/es.parquet"),
        ("https://github.com/a/b@v1 and me@example.org", "https://github.com/a/b@v1 and me@example.org"),
        (
            "outputs/hf_models and hf_hub/2.4 at s3://bucket/token=1",
            "outputs/hf_models and hf_hub/2.4 at s3://bucket/token=1",
        ),
        (
            "the base has no token for 'qq'; authorization is missing",
            "the base has no token for 'qq'; authorization is missing",
        ),
    ],
)
def test_a_text_is_shown_without_its_secrets(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "AWS_SESSION_TOKEN", "aws_secret_access_key", "AWS_ACCESS_KEY_ID", "LORS_NOTIFY_URL", "X_PASSWORD"],
)
def test_the_value_of_a_secret_variable_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "planted in it")
    assert redact("(planted in it)") == "(***)"
    monkeypatch.setenv(name, "a word")
    assert redact("a word") == "a word"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "planted in it")
    assert redact("planted in it") == "planted in it"


@given(st.text(max_size=60))
def test_to_replace_twice_is_to_replace_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("name", errors.__all__)
def test_no_error_says_a_secret(name: str) -> None:
    error = getattr(errors, name)(f"the hub refuses {HUB}")
    assert str(error) == "the hub refuses ***"
    assert HUB not in repr(error)


def fail(what: str, report: Any) -> NoReturn:
    raise RuntimeError(f"no answer from {what}")


def test_a_child_s_error_and_its_log_say_no_secret(capfd: pytest.CaptureFixture[str]) -> None:
    job = {"call": f"{__name__}:fail", "arguments": {"what": f"https://me:{HUB}@host"}}
    answer = perform(job, lambda event: None)
    assert answer["message"] == "failed with RuntimeError: no answer from https://***@host"
    assert "no answer from https://***@host" in (said := capfd.readouterr().err)
    assert HUB not in said


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"base": "https://me:password@host/model"}, "base"),
        ({"base": HUB}, "base"),
        ({"store": "s3://me:password@bucket/prefix"}, "store"),
        ({"output": Path("https://me:password@host/out")}, "output"),
        (
            {"corpora": {"source": "manifest", "path": f"https://host/{{language}}-{{split}}.jsonl?token={HUB}"}},
            "corpora.path",
        ),
        (
            {"corpora": {"source": "datasets", "path": "a/b", "overrides": {"es": {"revision": HUB}}}},
            "corpora.overrides.es.revision",
        ),
        ({"compare": ["ties", HUB]}, "compare"),
        ({HUB: 1}, "a key"),
        ({"unknown": {"deep": [{"x": HUB}]}}, "unknown.deep.x"),
    ],
)
def test_a_setting_with_a_secret_is_refused_and_not_said(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(SETTINGS | changes)
    assert f"{place} holds a secret" in str(caught.value)
    assert HUB not in str(caught.value)
    assert "password@" not in str(caught.value)
    with pytest.raises(ValueError, match=f"{re.escape(place)} holds a secret"):  # as Prefect validates a parameter
        Experiment.model_validate(SETTINGS | changes)


def test_a_secret_of_the_environment_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted/planted+planted")
    assert secret_setting({"a": ["b", "x planted/planted+planted"]}) == "a"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "minioadmin")  # as such servers are set up; a bucket may be called so
    assert secret_setting(SETTINGS | {"store": "s3://minioadmin-bucket"}) is None
    assert parse_experiment(SETTINGS | {"store": "s3://minioadmin-bucket/x"}).languages == ("es",)


def test_files_with_a_secret(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(f"base: starter\nlanguages: [es, {HUB}\n")
    with pytest.raises(ConfigError, match="is not valid YAML") as caught:
        load_experiment(file)
    assert HUB not in str(caught.value)
    assert caught.value.__suppress_context__  # whose text has the line
    checks = examine(file)
    assert not checks[0].ok
    assert HUB not in str(checks)
    file.write_text(f"base: {HUB}\nlanguages: [es]\ncorpora: {{source: synthetic}}\noutput: {tmp_path}\n")
    for changes in ([], ["base"], [f"base={HUB}"]):
        with pytest.raises(ConfigError) as caught:
            load_experiment(file, changes)
        assert HUB not in str(caught.value)
    (tmp_path / "summary.json").write_text("{}")
    file.write_text(f"base: starter\nlanguages: [es]\ncorpora: {{source: synthetic}}\noutput: {tmp_path}\n")
    before = file.read_text()
    with pytest.raises(ConfigError, match=r"corpora_of\.fr\.revision holds a secret"):
        with_language(file, "fr", {"source": "datasets", "path": "a/b", "revision": HUB})
    assert file.read_text() == before
