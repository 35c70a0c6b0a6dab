"""What can pass of the network's failures, and patience with them. The hub's client is imported where it failed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["can_pass", "lost_connection", "patiently"]

_T = TypeVar("_T")
_DELAYS = (1.0, 4.0)
"""Seconds before each further try, up to half as long again by chance, so that workers do not ask in step."""
# By name: which of them the client uses depends on its release.
_TRANSPORT = {
    ("httpx", "TransportError"),
    ("httpx2", "TransportError"),
    ("aiohttp", "ClientConnectionError"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
}


def can_pass(error: BaseException) -> bool:
    """Whether an error of the hub's client, or one it came from, is of the network or a busy server."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return False
    for seen in _chain(error):
        if isinstance(seen, HfHubHTTPError):
            return bool(seen.response.status_code >= 500 or seen.response.status_code in (408, 429))
        if _of_transport(seen):
            return True
    return False


def lost_connection(error: BaseException) -> BaseException | None:
    """The error of a connection, or of a server that is too busy to answer, that an error came from, or is."""
    return next((seen for seen in _chain(error) if _of_transport(seen) or _of_a_busy_server(seen)), None)


def _of_a_busy_server(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return type(error).__name__.endswith("HTTPStatusError") and isinstance(status, int) and status >= 500


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _of_transport(error: BaseException) -> bool:
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(kinds & _TRANSPORT)


def patiently(call: Callable[[], _T]) -> _T:
    """What the call returns, tried again with back-off where its error can pass; the last error is raised as it is."""
    for delay in _DELAYS:
        try:
            return call()
        except Exception as error:
            if not can_pass(error):
                raise
        time.sleep(delay * random.uniform(1.0, 1.5))
    return call()
