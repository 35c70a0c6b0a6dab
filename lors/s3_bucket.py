"""The objects under an S3 URL, and what goes wrong there in one sentence. s3fs is imported where one is used."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lors.errors import InputError, LorsError, StepFailedError

__all__ = ["Bucket", "Object", "check_url", "interference"]

_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?P<prefix>(/[A-Za-z0-9!_.*'()=-]+)*)/?")
_AT_ONCE = 4  # parts of one file on their way, each of some 50 MB of memory


def check_url(url: str) -> str:
    """`s3://bucket` or `s3://bucket/prefix` without a slash at the end; ValueError where it is neither."""
    if set(url[len("s3:") :]) & set("@?#:"):
        raise ValueError(
            "an S3 URL is s3://bucket or s3://bucket/prefix, without user, port or query: credentials and the endpoint "
            "belong to the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...)"
        )
    found = _URL.fullmatch(url)
    if found is None or {".", ".."} & set(found["prefix"].split("/")):
        raise ValueError(f"{url!r} is not s3://bucket or s3://bucket/prefix with the plain names that S3 allows")
    return url.rstrip("/")


def interference(what: str) -> StepFailedError:
    return StepFailedError(f"Another process wrote {what} at the same time; run the same command again.")


@dataclass(frozen=True, slots=True)
class Object:
    size: int
    stamp: str
    """Another one after every write, in seconds' time even of the same content."""


@cache
def _clients(process: int, environment: tuple[tuple[str, str], ...]) -> tuple[Any, Any]:
    """One for small objects and one for files; making them takes a second, and no fork may use its parent's."""
    import s3fs
    from fsspec.asyn import sync

    # A lease is renewed by requests that fail soon, and again at the next beat; what is large has more patience.
    quick = {"connect_timeout": 5, "read_timeout": 5, "retries": {"total_max_attempts": 1}}
    patient = {"retries": {"total_max_attempts": 5, "mode": "standard"}}
    found = []
    for config in (quick, patient):
        fs = s3fs.S3FileSystem(anon=False, use_listings_cache=False, skip_instance_cache=True, config_kwargs=config)
        sync(fs.loop, fs.set_session)
        found.append(fs)
    found[0].retries = 1
    return found[0], found[1]


class Bucket:
    """The objects under a URL; every method raises InputError or StepFailedError where S3 fails."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._name, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
        with _explained(url):
            from fsspec.asyn import sync

            self._sync = sync
            self._quick, self._files = _clients(os.getpid(), environment)

    def list(self, folder: str) -> dict[str, Object]:
        """The objects of a folder by their name in it."""
        prefix, found, where = f"{self._prefix}{folder}/", dict[str, Object](), dict[str, Any]()
        with _explained(self.url):
            while True:
                page = self._files.call_s3("list_objects_v2", Bucket=self._name, Prefix=prefix, **where)
                for item in page.get("Contents", ()):
                    stamp = f"{item['ETag']} {item['LastModified'].isoformat()}"
                    found[item["Key"].removeprefix(prefix)] = Object(item["Size"], stamp)
                if not page.get("IsTruncated"):
                    return found
                where = {"ContinuationToken": page["NextContinuationToken"]}

    def get(self, name: str) -> tuple[bytes, str] | None:
        """The content and the ETag of a small object; None where there is none."""

        async def read() -> tuple[bytes, str]:
            answer = await self._quick._call_s3("get_object", Bucket=self._name, Key=self._prefix + name)
            async with answer["Body"] as body:
                return await body.read(), answer["ETag"]

        with _explained(self.url):
            try:
                found: tuple[bytes, str] = self._sync(self._quick.loop, read)
                return found
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return None

    def put(self, name: str, content: bytes, **condition: Any) -> str | None:
        """Write a small object, where the condition (IfMatch, IfNoneMatch) holds; its ETag, or None."""
        with _explained(self.url):
            try:
                answer = self._quick.call_s3(
                    "put_object", Bucket=self._name, Key=self._prefix + name, Body=content, **condition
                )
                etag: str = answer["ETag"]
                return etag
            except OSError as error:
                if _code(error) in _REFUSED:
                    return None
                raise

    def delete(self, name: str, **condition: Any) -> None:
        """Delete an object, which need not exist, where the condition (IfMatch) holds."""
        with _explained(self.url):
            try:
                self._quick.call_s3("delete_object", Bucket=self._name, Key=self._prefix + name, **condition)
            except OSError as error:
                if _code(error) not in _REFUSED:
                    raise

    def upload(self, path: Path, name: str) -> None:
        """Write a file of any size to a name that must be free."""
        with _explained(self.url):
            try:
                self._files.put_file(
                    str(path), f"{self._name}/{self._prefix}{name}", mode="create", max_concurrency=_AT_ONCE
                )
            except OSError as error:
                if _code(error) in _REFUSED:
                    raise interference(f"{self.url}/{name}") from error
                raise

    def download(self, name: str, path: Path) -> None:
        """Read an object of any size into a file; StepFailedError where there is none."""
        with _explained(self.url):
            try:
                self._files.get_file(f"{self._name}/{self._prefix}{name}", str(path), max_concurrency=_AT_ONCE)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchKey":
                    raise StepFailedError(
                        f"The object {self.url}/{name} is gone; run the same command again, and it will be made again."
                    ) from error
                raise


_REFUSED = {"PreconditionFailed", "412", "NoSuchKey", "404", "ConditionalRequestConflict", "409"}
"""What S3 says where the condition of a write does not hold, or cannot be told."""
_DENIED = {
    "AccessDenied",
    "AccountProblem",
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NotSignedUp",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "401",
    "403",
}
_ELSEWHERE = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what S3 and the network say into one sentence; errors of local files are left as they are."""
    try:
        yield
    except LorsError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"The store {url} needs the extra s3: pip install 'lors[s3]'.") from error
    except Exception as error:
        code, kind = _code(error), type(error).__name__
        if code == "NoSuchBucket":
            raise InputError(f"The bucket of {url} does not exist: create it, or correct `store`.") from error
        if kind in _NO_CREDENTIALS:
            raise InputError(
                f"There are no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
            ) from error
        if code in _DENIED:
            raise InputError(
                f"The server refuses {url} to these credentials ({code}): check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and that they may list, read, write and delete there."
            ) from error
        if code in ("NotImplemented", "501"):
            raise InputError(
                f"The server of {url} does not know a request that LoRS makes: use one that has conditional writes."
            ) from error
        if code in _ELSEWHERE:
            raise InputError(
                f"The bucket of {url} is in another region ({code}): set AWS_REGION to its own."
            ) from error
        if code is not None or isinstance(error, ConnectionError | TimeoutError) or _of_network(error):
            raise StepFailedError(
                f"{url} could not be used ({code or kind}): check the network and AWS_ENDPOINT_URL, then run the same "
                "command again; finished steps are kept."
            ) from error
        if isinstance(error, ValueError) and "endpoint" in str(error).lower():
            raise InputError("AWS_ENDPOINT_URL is not a URL such as https://host:port: correct it.") from error
        raise


def _code(error: BaseException) -> str | None:
    """The server's word for an error, also where s3fs has made an OSError of it."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
    return None


def _of_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in ("aiobotocore", "aiohttp", "botocore")
