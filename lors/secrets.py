"""Tokens and passwords, kept out of what is written: refused in settings, replaced in messages.

They belong to the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, LORS_NOTIFY_URL, ...) or to a Prefect block.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["redact", "secret_setting"]

HIDDEN = "***"
_VARIABLE = re.compile(r"(.*_)?(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|ACCESS_KEY_ID|AUTH_STRING|NOTIFY_URL)")
# Of a variable's value: a shorter one may be a word, and would be replaced wherever it is written; or be part of a name
# that somebody chose for a bucket, say, and would be refused there.
_SHORTEST, _SHORTEST_REFUSED = 8, 16
_SHAPES = (
    (re.compile(r"(?<=://)[^\s/@?#'\"]+@"), f"{HIDDEN}@"),  # https://user:password@host
    (
        re.compile(
            r"(?i)(?<=[?&;])((?:[\w.-]*[_.-])?(?:token|secret|password|signature|sig|credential|api_?key|access_?key))"
            r"=[^\s&;#'\"]+"
        ),
        rf"\1={HIDDEN}",
    ),
    (re.compile(r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:[a-z0-9-]+\s+)?)[^\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?<![A-Za-z0-9])(?:hf|pnu|pnb)_[A-Za-z0-9]{20,}"), HIDDEN),  # of the hub, of Prefect Cloud
    (re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"), HIDDEN),  # of AWS
)


def redact(text: str, shortest: int = _SHORTEST) -> str:
    """The text with *** in place of what is secret: values of such variables, passwords in URLs, known tokens."""
    for value in sorted(_values(shortest), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for shape, shown in _SHAPES:
        text = shape.sub(shown, text)
    return text


def _values(shortest: int) -> list[str]:
    """What the environment says must not be seen."""
    found = ((name.upper(), value.strip()) for name, value in os.environ.items())
    return [value for name, value in found if len(value) >= shortest and _VARIABLE.fullmatch(name)]


def secret_setting(value: Any, place: str = "") -> str | None:
    """The dotted key of the first setting that holds a secret, as a value or a key; None where none does."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and _holds(key):
                return place or "a key"
            if (found := secret_setting(inner, f"{place}.{key}" if place else str(key))) is not None:
                return found
    elif isinstance(value, list | tuple):
        return next((found for inner in value if (found := secret_setting(inner, place)) is not None), None)
    elif isinstance(value, str | os.PathLike):
        # A path has lost a slash: https:/user:password@host.
        return place if _holds(re.sub(r"(?<=\w):/(?!/)", "://", os.fspath(value))) else None
    return None


def _holds(text: str) -> bool:
    return redact(text, _SHORTEST_REFUSED) != text
