"""Data sets of the Hugging Face hub, and folders laid out as the hub lays them out: Parquet with the audio inside.

A step's key covers exactly the files that its (configuration, split) reads. The hub's are read at one commit, and its
loading scripts are never run.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lors.errors import ConfigError, CorpusError, LorsError, UnreachableError
from lors.files import file_digest, is_safe
from lors.network import can_pass, patiently
from lors.speech.corpora.layout import Layout, find_layout
from lors.speech.corpora.manifest import FIELDS, Row, check_columns, to_candidates, values
from lors.speech.corpora.presets import PRESETS, Preset
from lors.speech.corpora.settings import DatasetsCorpora
from lors.speech.corpus import Candidate

__all__ = ["candidates", "describe"]


def describe(
    corpora: DatasetsCorpora, language: str, split: str, memo: MutableMapping[str, str] | None
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """What shapes the rows of a split, the digest of what they are read from, and where that lies.

    A folder is known by the contents of the files that are read, a data set of the hub by its commit. The commit that
    a revision was last found at, and its files, stay in `memo` for when there is no network.

    Raises CorpusError or ConfigError: the data set, its revision, configuration, split or a column is missing, or it
    may not be read; UnreachableError: the hub does not answer now.
    """
    preset = PRESETS[corpora.preset] if corpora.preset else Preset("", {}, {})
    path = (corpora.path or preset.path).format(language=language)
    name = _name(corpora, preset, language)
    source, start, stop = _sliced(corpora.splits.get(split) or preset.splits.get(split, split))
    english = None if language == "en" or "translation" in corpora.columns else preset.english
    settings = {
        "columns": {**preset.further, **preset.columns, **corpora.columns},
        "needed": sorted({*preset.columns, *corpora.columns}),
        "name": name,
        "rows": [source, start, stop],
        "english": english,
        "no_speaker": preset.no_speaker,
    }
    wanted = [(name, source), *([(english["name"], None)] if english else [])]
    if Path(path).is_dir():
        root = Path(path).absolute()
        layout = find_layout(f"the folder {path}", *_listed(root))
        files = [[str(root / file) for file in layout.files_of(*each)] for each in wanted]
        _check(f"{path} ({name or 'default'})", _columns(files[0][0]), settings)
        with _sentences(path):
            digests = [file_digest(Path(file), memo) for file in chain(*files)]
        return settings, {"files": hashlib.sha256("\n".join(digests).encode()).hexdigest()}, {"files": files}
    if Path(path).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise CorpusError(
            f"{path} is neither a folder nor the id of a data set, like google/fleurs; check corpora.path"
        )
    commit, listed = _resolved(path, corpora.revision or preset.revision, wanted, memo)
    places = {"hub": path, "commit": commit, "wanted": wanted, "files": listed, "streaming": corpora.streaming}
    return settings, {"hub": f"{path}@{commit}"}, places


def candidates(settings: Mapping[str, Any], places: Mapping[str, Any]) -> Iterator[Candidate]:
    """The rows of a split that `describe` described, for `write_split`; reads no more of the hub than is taken."""
    files = _fetched(places) if "hub" in places else places["files"]
    what = places.get("hub") or str(Path(files[0][0]).parent)
    mapping = {name: name for name in FIELDS} | settings["columns"]
    english = settings["english"]
    columns = [column for column in mapping.values() if column] + ([english["key"]] if english else [])
    present, rows = _read(what, files[0], columns, mapping["audio"])
    _check(what, present, settings)
    texts: dict[Any, str] = {}
    if english:
        mapping["translation"] = _ENGLISH
        there, sentences = _read(what, files[1], [english["key"], english["text"]])
        if english["key"] not in present or not {english["key"], english["text"]} <= {*there}:
            raise CorpusError(
                f"{what} cannot be joined to its configuration {english['name']}, as it has no column {english['key']} "
                f"or {english['text']} in both; map the translation under columns"
            )
        for row in sentences:
            texts.setdefault(row[english["key"]], row[english["text"]])

    def adapted() -> Iterator[Row]:
        for row in islice(rows, *settings["rows"][1:]):
            if isinstance(audio := row[mapping["audio"]], dict) and not audio["bytes"]:
                yield "missing file", f"the Parquet file holds no audio in this row, only the path {audio['path']}"
                continue
            if english:
                row[_ENGLISH] = texts.get(row[english["key"]])
            if settings["no_speaker"] and row.get(mapping["speaker"]) == settings["no_speaker"]:
                row[mapping["speaker"]] = None
            yield row

    return to_candidates(adapted(), mapping, Path(), what)


_ENGLISH = "English sentence"  # a column's name that no data set has


def _name(corpora: DatasetsCorpora, preset: Preset, language: str) -> str | None:
    """The configuration; None is the only one, or the default."""
    if corpora.name is not None:
        try:
            return corpora.name.format(language=language)
        except (AttributeError, IndexError, KeyError, ValueError) as error:
            raise ConfigError(f"corpora.name {corpora.name!r} may have {{language}} in braces, nothing else") from error
    if corpora.preset and language not in preset.names:
        raise ConfigError(
            f"the preset {corpora.preset} has no {language}: choose from {', '.join(sorted(preset.names))}, or give "
            f"{language} another source under corpora_of"
        )
    return preset.names.get(language)


def _sliced(text: str) -> tuple[str, int | None, int | None]:
    """The split and the rows that `train`, `train[:200]` or `train[200:]` names."""
    found = re.fullmatch(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?", text)
    if not found or (found[2] and found[3] and int(found[2]) >= int(found[3])):
        raise ConfigError(
            f"corpora.splits: {text!r} is no split and no slice of one; a slice is of row numbers, as in train[:200] "
            "or train[200:400]"
        )
    return found[1], int(found[2]) if found[2] else None, int(found[3]) if found[3] else None


def _listed(root: Path) -> tuple[list[str], str]:
    """The files of a folder, relative, and its README.md."""
    files = [file.relative_to(root) for file in root.rglob("*") if file.suffix in (".parquet", ".py")]
    card = root / "README.md"
    plain = [file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)]
    return plain, card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def _columns(file: str) -> list[str]:
    try:
        return list(pq.read_schema(file).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"{file} is not a readable Parquet file ({error}); copy it again") from error


def _check(what: str, present: Sequence[str], settings: Mapping[str, Any]) -> None:
    mapping = {name: name for name in FIELDS} | settings["columns"]
    check_columns(what, present, {name: column for name, column in mapping.items() if column}, settings["needed"])


def _read(
    what: str, files: Sequence[str], columns: Iterable[str], audio: str | None = None
) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """All columns that there are, and the rows with those of `columns` among them."""
    from datasets import Audio, IterableDataset

    def opened(file: str, only: list[str] | None) -> Any:
        return IterableDataset.from_parquet([glob.escape(file)], split="train", columns=only, batch_size=32)

    with _sentences(what):
        present = list(opened(files[0], None).features)
    wanted = [column for column in dict.fromkeys(columns) if column in present]

    def rows() -> Iterator[dict[str, Any]]:
        with _sentences(what):
            for file in files:
                data = opened(file, wanted).reshard()  # row group by row group, or a whole file would be held
                if audio in wanted:
                    data = data.cast_column(audio, Audio(decode=False))
                for table in data.with_format("arrow").iter(batch_size=32):
                    named = {name: values(table.column(name)) for name in table.column_names}
                    yield from (dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True))

    return present, rows()


_Wanted = Sequence[tuple[str | None, str | None]]  # (configuration, split)s
_COMMIT = re.compile(r"[0-9a-f]{40}")


def _resolved(
    path: str, revision: str | None, wanted: _Wanted, memo: MutableMapping[str, str] | None
) -> tuple[str, list[list[str]] | None]:
    """The commit of a data set and the files of each of `wanted`; None for these where only the commit is known."""
    key = f"hub {path}@{revision or 'main'} {json.dumps(wanted)}"
    known = _known(memo[key]) if memo is not None and key in memo else None
    fixed = revision if revision and _COMMIT.fullmatch(revision) else None
    if fixed and known:
        return fixed, known["files"]
    info = _info(path, revision, int(time.monotonic() / 300))
    if isinstance(info, Exception) and _unreachable(info):
        if known:
            return known["commit"], known["files"]
        if fixed:
            return fixed, None
    if isinstance(info, Exception):
        raise _sentence(path, info, revision) from info
    commit, layout = info
    files = [layout.files_of(*each) for each in wanted]
    if memo is not None:
        memo[key] = json.dumps({"commit": commit, "files": files})
    return commit, files


def _known(text: str) -> dict[str, Any] | None:
    """What a memo says of a data set; None where it is not what `_resolved` writes."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        known: dict[str, Any] = json.loads(text)
        listed = all(isinstance(each, list) and all(map(is_safe, each)) for each in known["files"])
        return known if listed and _COMMIT.fullmatch(known["commit"]) else None
    return None


@lru_cache(maxsize=256)
def _info(path: str, revision: str | None, moment: int) -> tuple[str, Layout] | Exception:
    """The commit and the layout of a data set; asked once in five minutes, so that all its splits are of one commit."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = patiently(lambda: HfApi().dataset_info(path, revision=revision))
        if info.gated:  # what it is may be known by all, its files by those who accepted its terms
            HfApi().auth_check(path, repo_type="dataset")
        files = [sibling.rfilename for sibling in info.siblings or ()]
        card = ""
        if "README.md" in files:
            copy = hf_hub_download(path, "README.md", repo_type="dataset", revision=info.sha)
            card = Path(copy).read_text(encoding="utf-8", errors="replace")
        return str(info.sha), find_layout(f"the data set {path}", files, card)
    except Exception as error:  # kept like an answer: an unreachable hub is not asked again for each split
        return error


def _fetched(places: Mapping[str, Any]) -> list[list[str]]:
    """What `datasets` reads: addresses at the hub, or the copies in its cache."""
    path, commit, listed = places["hub"], places["commit"], places["files"]
    if listed is None:
        _, listed = _resolved(path, commit, [tuple(each) for each in places["wanted"]], None)
    if listed is None:
        raise _sentence(path, ConnectionError("its files are not known yet"), commit)
    if places["streaming"]:
        return [[f"hf://datasets/{path}@{commit}/{file}" for file in each] for each in listed]
    from huggingface_hub import hf_hub_download

    def fetched(file: str) -> str:
        return str(patiently(lambda: hf_hub_download(path, file, repo_type="dataset", revision=commit)))

    with _sentences(path):
        return [[fetched(file) for file in each] for each in listed]


@contextmanager
def _sentences(what: str) -> Iterator[None]:
    """Every failure of the hub or of a file, as one sentence."""
    try:
        yield
    except (LorsError, MemoryError):
        raise
    except Exception as error:  # the libraries' errors share no base: HTTP, offline mode, cache, Arrow, disk
        raise _sentence(what, error) from error


def _unreachable(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return bool(error.response.status_code >= 500 or error.response.status_code == 429)
    return not isinstance(error, LorsError | HFValidationError)


def _sentence(what: str, error: Exception, revision: str | None = None) -> LorsError:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, LorsError):
        return error
    login = "set HF_TOKEN or run `hf auth login`"
    if isinstance(error, GatedRepoError):
        return CorpusError(
            f"the data set {what} is gated: accept its terms at https://huggingface.co/datasets/{what}, then {login}"
        )
    if isinstance(error, RevisionNotFoundError):
        return CorpusError(f"the data set {what} has no revision {revision or 'main'}; check corpora.revision")
    if isinstance(error, RepositoryNotFoundError):
        return CorpusError(
            f"the hub has no data set {what} that may be read from here; check corpora.path, and if it is private, "
            f"{login}"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, pa.ArrowException | UnicodeError):
        return CorpusError(f"the Parquet files of {what} cannot be read as they are ({reason}); copy them again")
    if isinstance(error, HfHubHTTPError) and not _unreachable(error):
        return CorpusError(f"the hub refuses the data set {what} ({reason}); check its page")
    if can_pass(error):
        return UnreachableError(
            f"the data set {what} cannot be read now ({reason}); check the network and run the same command again, or "
            "download the data set and give its folder as corpora.path"
        )
    return CorpusError(
        f"the data set {what} cannot be read now ({reason}); connect this machine and unset HF_HUB_OFFLINE, or "
        "download the data set and give its folder as corpora.path"
    )
