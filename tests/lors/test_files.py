"""Files that survive a crash, their digests, and what a disk that cannot be written says."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path

import pytest

from lors.errors import InputError
from lors.files import SETTLED_NS, Memo, file_digest, storage_errors, write_json


def aged(path: Path) -> None:
    """Wait until a file's stat is old enough to be memoised."""
    while time.time_ns() - path.stat().st_ctime_ns <= 2 * SETTLED_NS:
        time.sleep(0.005)


def test_a_rewritten_file_of_the_same_size_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    memo: dict[str, str] = {}
    seen = set()
    for index in range(200):  # most within one tick of the clock
        path.write_bytes(b"%08d" % index)
        seen.add(file_digest(path, memo))
    assert len(seen) == 200
    tomorrow = time.time_ns() + 86_400 * 10**9  # a file of this very tick, or a server whose clock is ahead
    os.utime(path, ns=(tomorrow, tomorrow))
    memo.clear()
    file_digest(path, memo)
    assert memo == {}
    os.utime(path)
    aged(path)
    before, status = file_digest(path, memo), path.stat()
    assert len(memo) == 1
    with path.open("r+b") as file:  # in place: the same inode and size
        file.write(b"X")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # and the same mtime
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert file_digest(path, memo) != before
    assert file_digest(path, memo) == file_digest(path)


def test_memos_of_two_processes_are_joined_and_a_broken_one_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "memo.json"
    a, b = Memo(path), Memo(path)
    assert len(a) == len(b) == 0
    a["x"], b["y"] = "1", "2"
    a.save()
    b.save()
    assert dict(Memo(path)) == {"x": "1", "y": "2"}
    path.write_text('{"x": ')
    assert dict(Memo(path)) == {}
    path.write_text('{"x": 3, "y": "2"}')
    assert dict(Memo(path)) == {"y": "2"}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path, code: int) -> None:
    with pytest.raises(InputError, match="cannot be used"), storage_errors(tmp_path / "a"):
        raise OSError(code, os.strerror(code), str(tmp_path / "a" / "b"))
    with pytest.raises(OSError, match="corpus"), storage_errors(tmp_path / "a"):
        raise OSError(code, os.strerror(code), str(tmp_path / "corpus"))


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": (1, 2), "p": Path("a/b")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, 2], "p": "a/b"}
    for bad in (math.nan, {1, 2}):
        with pytest.raises((TypeError, ValueError)):
            write_json(path, {"a": bad})
    assert json.loads(path.read_text(encoding="utf-8"))["p"] == "a/b"
    assert list(tmp_path.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask  # another user's worker may read it
