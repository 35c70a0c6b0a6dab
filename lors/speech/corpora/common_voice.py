"""Common Voice as Mozilla Data Collective gives it: `cv-corpus-*/LOCALE` with train.tsv, dev.tsv, test.tsv,
validated.tsv and clips/*.mp3; and the translations of CoVoST 2 (Wang et al. 2020) for Common Voice 4.

Its TSV files quote nothing, so a quotation mark is text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import islice
from pathlib import Path

from lors.errors import ConfigError, CorpusError
from lors.speech.corpora.manifest import Row, Table, open_table, rows_digest, to_candidates
from lors.speech.corpus import Candidate

__all__ = ["candidates", "content_digest", "find_locale", "find_translations"]

_COLUMNS = {"audio": "path", "text": "sentence", "speaker": "client_id"}
_FILES = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
# As get_covost_splits.py of CoVoST 2 selects them.
_COVOST_SPLITS = {"train": ("train", "train_covost"), "validation": ("dev",), "test": ("test",)}
_TRANSLATION = "translation of CoVoST 2"  # a column's name that no table has


def find_locale(path: Path, language: str, locale: str | None) -> Path:
    """The folder of a language: `path`, or `LOCALE` or `cv-corpus-*/LOCALE` in it.

    Without a `locale` it is the language's code, or the only one that starts with it, as sv-SE for sv. CorpusError
    where there is none, or more than one.
    """
    if not path.is_dir():
        raise CorpusError(f"the Common Voice folder {path} does not exist; check the corpus' path")
    if _is_locale(path) and locale in (None, path.name):
        said = _said_locale(path)
        if locale is None and said and said.partition("-")[0] != language:
            raise CorpusError(
                f"the Common Voice folder {path} is of {said}, not of {language}; give the folder above it, or set "
                f"corpora.locale to {path.name} if it is {language} all the same"
            )
        return path
    places = [folder for pattern in ("*", "cv-corpus-*/*", "*/cv-corpus-*/*") for folder in sorted(path.glob(pattern))]
    there = list(dict.fromkeys(folder for folder in places if _is_locale(folder)))
    wanted = locale or language
    found = [folder for folder in there if folder.name == wanted]
    if locale is None:
        found = found or [folder for folder in there if folder.name.startswith(f"{language}-")]
    if not found:
        names = ", ".join(sorted({folder.name for folder in there})) or "no locale at all"
        raise CorpusError(
            f"the Common Voice folder {path} has no {wanted} with its TSV files (it has {names}); download that "
            "language from Mozilla Data Collective and unpack it there, or set corpora.locale"
        )
    if len(found) > 1:
        listed = " and ".join(str(folder.relative_to(path)) for folder in found)
        setting = "locale" if len({folder.name for folder in found}) > 1 else "path"
        raise CorpusError(f"the Common Voice folder {path} has {listed}; say which one, with corpora.{setting}")
    return found[0]


def _is_locale(folder: Path) -> bool:
    return bool(_tables(folder))


def _tables(folder: Path) -> list[Path]:
    return [table for name in ("validated.tsv", *_FILES.values()) if (table := folder / name).is_file()]


def _said_locale(folder: Path) -> str:
    """The locale that a table's first row says, empty where it says none, as in old releases."""
    with _tables(folder)[0].open(encoding="utf-8-sig", errors="replace") as file:
        header, first = (file.readline().rstrip("\n").split("\t") for _ in range(2))
    return dict(zip(header, first, strict=False)).get("locale", "")


def find_translations(pattern: str | None, language: str, locale: str) -> Path | None:
    """CoVoST 2's table, with the language's code or Common Voice's in the place of `{language}`."""
    if pattern is None:
        return None
    try:
        paths = [Path(pattern.format(language=code)).absolute() for code in (language, locale)]
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise ConfigError(f"corpora.translations {pattern!r} may have {{language}} in braces, nothing else") from error
    return next((path for path in paths if path.is_file()), paths[0])


def candidates(
    folder: Path,  # of the locale
    split: str,
    columns: Mapping[str, str],  # that win over Common Voice's
    translations: Path | None,  # covost_v2.LOCALE_en.tsv, which then gives the splits
) -> Iterator[Candidate]:
    """The rows of a split, for `write_split`. CorpusError at once where a file or a column is missing."""
    table = _table(folder, split, columns, translations)
    clips = folder / "clips"
    return to_candidates(table.rows, table.mapping, clips, _file(split, translations), clips)


def content_digest(
    folder: Path,
    split: str,
    columns: Mapping[str, str],
    translations: Path | None,
    memo: MutableMapping[str, str] | None,
    count: int | None,  # of the rows that are read; None is all
) -> str:
    """sha256 (hex) over the values of the split's rows, translations among them, and the bytes of their clips."""
    table = _table(folder, split, columns, translations)
    clips = folder / "clips"
    return rows_digest(islice(table.rows, count), table.mapping, clips, memo, within=clips)


def _file(split: str, translations: Path | None) -> str:
    return _FILES[split] if translations is None else "validated.tsv"


def _table(folder: Path, split: str, columns: Mapping[str, str], translations: Path | None) -> Table:
    if not (folder / "clips").is_dir():
        raise CorpusError(f"{folder} has no folder clips; unpack the whole archive of Common Voice")
    table = open_table(folder / _file(split, translations), {**_COLUMNS, **columns})
    if translations is None:
        return table
    mapping = {**table.mapping, "translation": _TRANSLATION}
    by_clip = _translations(translations, split)

    def joined() -> Iterator[Row]:
        missing = True
        for row in table.rows:
            if isinstance(row, dict) and (clip := row[mapping["audio"]]) in by_clip:
                missing = False
                yield {**row, _TRANSLATION: by_clip[clip]}
        if missing:
            raise CorpusError(
                f"no clip of {folder / 'validated.tsv'} is in the {split} split of {translations}; CoVoST 2 is of "
                "Common Voice 4 and of the same language"
            )

    return Table(mapping, joined())


def _translations(path: Path, split: str) -> dict[str, str]:
    """The translation by clip of CoVoST 2's rows of a split."""
    try:
        # A backslash escapes in this table, other than in Common Voice's.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
            if missing := {"path", "translation", "split"} - set(rows.fieldnames or ()):
                raise CorpusError(
                    f"CoVoST 2's table {path} has no column {sorted(missing)[0]}; give covost_v2.LOCALE_en.tsv as it "
                    "was downloaded"
                )
            return {row["path"]: row["translation"] or "" for row in rows if row["split"] in _COVOST_SPLITS[split]}
    except FileNotFoundError as error:
        raise CorpusError(f"CoVoST 2's table {path} does not exist; check corpora.translations") from error
    except (csv.Error, OSError) as error:
        raise CorpusError(f"CoVoST 2's table {path} cannot be read ({error}); download it again") from error
