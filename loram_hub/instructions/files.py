"""Records of local files, each with its place; only a JSON list is in memory as a whole."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from loram_hub.digests import remembered_sha256
from loram_hub.errors import InvalidRequestError, MissingDependencyError, VerificationError
from loram_hub.files import parse_json
from loram_hub.instructions.sources import SUFFIXES

PlacedRecord = tuple[str, Mapping[str, object]]
"""Where a record stands, for messages, and the record."""
WHOLE_FILE_BYTES = 256 * 1024 * 1024
"""A JSON list is read in one piece; beyond this it should be in another format."""


def find_files(path: Path) -> tuple[Path, ...]:
    """Return the files of a local source, a folder's in the order of their paths; hidden ones are left out.

    Raises:
        InvalidRequestError: there is none of a known kind, or they are of several kinds.
    """
    known = [file for file in (_below(path) if path.is_dir() else [path]) if file.suffix in SUFFIXES]
    if not known:
        raise InvalidRequestError(f"{path} is or holds no file of a known kind: {', '.join(SUFFIXES)}.")
    kinds = Counter(file.suffix for file in known)
    if len(kinds) > 1:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise InvalidRequestError(f"{path} holds files of several kinds ({found}). Name each kind as a source.")
    return tuple(known)


def _below(folder: Path) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return sorted(visible, key=lambda file: file.relative_to(folder).as_posix())


def content_sha256(root: Path, files: tuple[Path, ...]) -> str:
    """Return the SHA-256 of a file; of a folder, that of the names and hashes of its files."""
    if root.is_file():
        return remembered_sha256(root)
    state = hashlib.sha256()
    for file in files:
        state.update(f"{file.relative_to(root).as_posix()}\0{remembered_sha256(file)}\n".encode())
    return state.hexdigest()


def records_of(file: Path) -> Iterator[PlacedRecord]:
    """Yield the records of a file.

    Raises:
        VerificationError: the file is damaged, or no such file as its name says.
        InvalidRequestError: a JSON file holds no list of objects, or is too large.
        MissingDependencyError: pyarrow is not installed.
    """
    match file.suffix:
        case ".jsonl":
            yield from _of_jsonl(file)
        case ".json":
            yield from _of_json(file)
        case ".csv":
            yield from _of_csv(file)
        case _:
            yield from _of_parquet(file)


def _of_jsonl(file: Path) -> Iterator[PlacedRecord]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}:{number}", parse_json(line, source=f"{file}:{number}")
    except UnicodeDecodeError as err:
        raise VerificationError(f"{file} is not UTF-8 text: {err}") from err


def _of_json(file: Path) -> Iterator[PlacedRecord]:
    if (size := file.stat().st_size) > WHOLE_FILE_BYTES:
        raise InvalidRequestError(
            f"{file} is {size:,} bytes; a JSON list is read in one piece, and at most {WHOLE_FILE_BYTES:,} are. Write "
            "it as .jsonl, one record per line."
        )

    def refuse(name: str) -> NoReturn:
        raise VerificationError(f"{file} holds {name}, which is not JSON.")

    try:
        records: Any = json.loads(file.read_text(encoding="utf-8-sig"), parse_constant=refuse)
    except VerificationError:
        raise
    except (ValueError, RecursionError) as err:
        raise VerificationError(f"{file} is not valid JSON: {err}") from err
    if not isinstance(records, list):
        raise InvalidRequestError(f"{file} holds a JSON {type(records).__name__}; a list of records is needed.")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise InvalidRequestError(f"{file} record {number} is a {type(record).__name__}; an object is needed.")
        yield f"{file} record {number}", record


def _of_csv(file: Path) -> Iterator[PlacedRecord]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            for record in reader:
                place = f"{file}:{reader.line_num}"
                if None in record or None in record.values():
                    raise VerificationError(f"{place} has another number of fields than the {len(record)} of line 1.")
                yield place, record
    except UnicodeDecodeError as err:
        raise VerificationError(f"{file} is not UTF-8 text: {err}") from err
    except csv.Error as err:
        raise VerificationError(
            f"{file} cannot be read as CSV: {err}. Long texts are better written as .jsonl."
        ) from err


def _of_parquet(file: Path) -> Iterator[PlacedRecord]:
    try:
        from pyarrow import ArrowInvalid  # type: ignore[import-untyped]  # ships no types
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as err:
        raise MissingDependencyError(f"Reading {file} needs pyarrow: pip install datasets") from err
    try:
        with ParquetFile(file) as opened:
            number = 0
            for batch in opened.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", record
    except (ArrowInvalid, OSError) as err:
        raise VerificationError(f"{file} cannot be read as parquet: {err}") from err
