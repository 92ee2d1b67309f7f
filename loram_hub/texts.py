"""Text data in, token ids out: what calibration, alignment and evaluation read.

Data is named by one *specification*, the same everywhere: a list in memory, a file (`.jsonl`, `.json`, `.txt`,
`.parquet`), a folder of such files, or the id of a dataset on the Hub (`org/name`, or `org/name:config`, each also with
`@revision`). A record is a text (`{"text": ...}` or a plain string) or a task (`{"prompt": ..., "completion": ...}`,
the names that TRL uses). A `.txt` file is one text.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loram_hub.errors import (
    AccessError,
    CheckpointError,
    InvalidRequestError,
    MissingDependencyError,
    VerificationError,
)
from loram_hub.files import parse_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
"""Kinds of files that are read; others in a folder are passed over."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/@]+)?(@[^@\s]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A prompt with the completion a model is to learn; a plain text is a completion without prompt."""

    prompt: str
    """What the model is given, literally: no template is put around it."""
    completion: str
    """What it should answer, without the end-of-sequence token."""


Record = str | Example | Mapping[str, object]
Specification = str | os.PathLike[str] | Sequence[Record]

Calibration: TypeAlias = "torch.Tensor | npt.NDArray[np.int64] | str | os.PathLike[str] | list[str] | None"
"""Token ids (samples, tokens), or texts: a list, a file, a folder or a dataset id."""
CALIBRATION_RECORDS = 10_000
"""Records read at most: a dataset on the Hub may have billions."""


def read_texts(spec: Specification, *, split: str = "train", limit: int | None = None) -> list[str]:
    """Read texts, for calibration or plain training; a task counts as its prompt followed by its completion.

    Args:
        spec: list, file, folder or Hub dataset id, see the module's first lines.
        split: split of a Hub dataset; ignored for files and lists.
        limit: read at most this many records (a Hub dataset is streamed, so the rest is never downloaded).

    Returns:
        The texts that are not blank, in order.

    Raises:
        InvalidRequestError: there is no such data, nothing in it, or a record of another kind.
        VerificationError: a file is damaged.
        AccessError: the Hub dataset does not exist, or the Hub cannot be reached.
        MissingDependencyError: `datasets` (Hub) or `pyarrow` (parquet) is not installed.
    """
    return [example.prompt + example.completion for example in read_examples(spec, split=split, limit=limit)]


def read_examples(spec: Specification, *, split: str = "train", limit: int | None = None) -> list[Example]:
    """Read prompt/completion tasks, for fine-tuning or evaluation; a plain text becomes a completion without prompt.

    Arguments and errors are those of `read_texts`.
    """
    found = [
        example
        for source, record in islice(_records(spec, split), limit)
        if (example := _example(record, source)).completion.strip()
    ]
    if not found:
        kinds = ", ".join(SUFFIXES)
        raise InvalidRequestError(f"{_name(spec)} holds no text. Give a list, file ({kinds}) or Hub dataset with some.")
    return found


def dataset_id(spec: Specification) -> str | None:
    """Return the Hub id of a specification that is one, without its revision; None for a list, file or folder."""
    is_id = isinstance(spec, str) and not Path(spec).expanduser().exists()
    return str(spec).partition("@")[0] if is_id else None


def _name(spec: Specification) -> str:
    return str(spec) if isinstance(spec, str | os.PathLike) else f"The list of {len(spec):,} records"


def _records(spec: Specification, split: str) -> Iterator[tuple[str, object]]:
    """Yield (where it stands, record)."""
    if not isinstance(spec, str | os.PathLike):
        yield from ((f"Record {idx} of the list", record) for idx, record in enumerate(spec))
        return
    path = Path(spec).expanduser()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and file.suffix in SUFFIXES:
                yield from _records_of_file(file)
    elif path.is_file():
        yield from _records_of_file(path)
    elif _HUB_ID.fullmatch(str(spec)) and path.suffix not in SUFFIXES:
        yield from _records_of_dataset(str(spec), split)
    else:
        raise InvalidRequestError(f"{spec} is no existing file or folder, and no Hub dataset id (org/name) either.")


def _records_of_file(path: Path) -> Iterator[tuple[str, object]]:
    match path.suffix:
        case ".txt":
            yield str(path), _read_utf8(path)
        case ".jsonl":
            for number, line in enumerate(_read_utf8(path).split("\n"), start=1):  # splitlines() also splits at U+2028
                if line.strip():
                    yield f"{path}:{number}", parse_json(line, source=f"{path}:{number}")
        case ".json":
            try:
                records = json.loads(_read_utf8(path))
            except (ValueError, RecursionError) as err:
                raise VerificationError(f"{path} is not valid JSON: {err}") from err
            if not isinstance(records, list):
                raise InvalidRequestError(f"{path} holds a JSON {type(records).__name__}; a list of records is needed.")
            yield from ((f"{path} record {idx}", record) for idx, record in enumerate(records))
        case ".parquet":
            yield from _records_of_parquet(path)
        case _:
            raise InvalidRequestError(f"{path} is of no known kind; {', '.join(SUFFIXES)} are read.")


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise VerificationError(f"{path} is not UTF-8 text: {err}") from err


def _records_of_parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowInvalid  # type: ignore[import-untyped]  # ships no types
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as err:
        raise MissingDependencyError(f"Reading {path} needs pyarrow: pip install datasets") from err
    try:
        with ParquetFile(path) as file:
            idx = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield f"{path} row {idx}", record
                    idx += 1
    except (ArrowInvalid, OSError) as err:
        raise VerificationError(f"{path} cannot be read as parquet: {err}") from err


def _records_of_dataset(name: str, split: str) -> Iterator[tuple[str, object]]:
    try:
        import datasets  # type: ignore[import-untyped]  # ships no types
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as err:
        raise MissingDependencyError(
            f"{name} is no file or folder; reading it from the Hub needs: pip install datasets"
        ) from err
    dataset, _, revision = name.partition("@")
    repository, _, config = dataset.partition(":")
    pinned = {"revision": revision} if revision else {}
    try:
        records = datasets.load_dataset(repository, config or None, split=split, streaming=True, **pinned)
        yield from ((f"{name} row {idx}", record) for idx, record in enumerate(records))
    except (datasets.exceptions.DatasetNotFoundError, HfHubHTTPError, ConnectionError) as err:
        raise AccessError(f"{name} is no file or folder, and it cannot be had from the Hub: {err}") from err
    except (ValueError, FileNotFoundError) as err:  # an unknown split or config; the message lists those that exist
        raise InvalidRequestError(f"{name} cannot be read: {err}") from err


def _example(record: object, source: str) -> Example:
    if isinstance(record, Example):
        return record
    if isinstance(record, str):
        return Example(prompt="", completion=record)
    if isinstance(record, Mapping):
        match record:
            case {"prompt": str(prompt), "completion": str(completion)}:
                return Example(prompt=prompt, completion=completion)
            case {"text": str(text)}:
                return Example(prompt="", completion=text)
        found = f"fields {sorted(map(str, record))}"
    else:
        found = type(record).__name__
    raise InvalidRequestError(f"{source} has {found}; it needs 'text', or 'prompt' and 'completion', each a string.")


def calibration_ids(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, samples: int, tokens: int, seed: int = 0
) -> torch.LongTensor:
    """Pack texts into equally long rows of token ids, for Taylor importance.

    The texts are shuffled, joined with the end-of-sequence token between them, and cut into rows; a row opens with
    whatever the tokenizer opens its inputs with (Llama and Gemma expect a begin-of-sequence token).

    Args:
        texts: enough text; what is not needed is not tokenized.
        tokenizer: the base model's.
        samples: rows.
        tokens: length of a row.
        seed: seed of the shuffle.

    Returns:
        Token ids of shape (samples, tokens), int64.

    Raises:
        InvalidRequestError: `samples` or `tokens` is not positive, or the texts are too short.
    """
    import torch

    if samples < 1 or tokens < 2:
        raise InvalidRequestError(f"Calibration asks for {samples} samples x {tokens} tokens; 1 x 2 is the least.")
    opening = list(tokenizer("")["input_ids"])
    per_row = max(tokens - len(opening), 1)
    needed = samples * per_row
    order = list(texts)
    random.Random(seed).shuffle(order)
    stream: list[int] = []
    for text in order:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if len(stream) >= needed:
            break
    if len(stream) < needed:
        raise InvalidRequestError(
            f"Calibration texts have {len(stream):,} tokens; {samples} samples x {tokens} tokens need {needed:,}. "
            "Give more text, or ask for fewer samples."
        )
    rows = [opening + stream[start : start + per_row] for start in range(0, needed, per_row)]
    return torch.LongTensor(rows)


def read_calibration(given: Calibration, tokenizer: Path, *, samples: int, tokens: int, seed: int) -> torch.Tensor:
    """Return calibration as token ids, whether it was given as ids or as texts.

    Args:
        given: see `Calibration`.
        tokenizer: folder of the model whose tokenizer texts go through.
        samples: rows, where texts were given.
        tokens: length of a row, where texts were given.
        seed: of the choice of texts.

    Returns:
        Token ids of shape (samples, tokens), int64, on the CPU.

    Raises:
        InvalidRequestError: none were given, or no token ids, or the texts are too short.
        CheckpointError: the folder has no tokenizer that can be opened.
    """
    import torch
    from transformers import AutoTokenizer

    if given is None:
        raise InvalidRequestError(
            "Calibration is needed: pass token ids (samples, tokens), or a file, folder or dataset with texts."
        )
    if not isinstance(given, str | os.PathLike | list):
        ids = torch.as_tensor(given)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InvalidRequestError(f"Calibration must be token ids, whole numbers; found {ids.dtype}.")
        return ids.cpu().long()
    try:
        opened = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as err:
        raise CheckpointError(
            f"{tokenizer} has no tokenizer that transformers can open, which calibration texts need: {err} "
            "Add one, or give calibration as token ids."
        ) from err
    texts = read_texts(given, limit=CALIBRATION_RECORDS)
    return calibration_ids(texts, opened, samples=samples, tokens=tokens, seed=seed)


def check_calibration(ids: torch.Tensor, *, vocab_size: int) -> None:
    """Raise `InvalidRequestError` unless calibration is token ids of the model, at least 1 sample of 2 tokens."""
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2 or ids.is_floating_point():
        raise InvalidRequestError(
            "Calibration must be token ids of shape (samples, tokens), at least 1 sample of 2 tokens; "
            f"found {ids.dtype} of shape {tuple(ids.shape)}."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InvalidRequestError(
            f"Calibration has token ids from {low} to {high}; the vocabulary has {vocab_size:,}. Wrong tokenizer?"
        )


def describe_calibration(ids: torch.Tensor) -> dict[str, Any]:
    """Return what a manifest says of calibration ids: samples, tokens, and the SHA-256 of the ids as int64."""
    data = ids.numpy().astype("<i8").tobytes()
    return {"samples": ids.shape[0], "tokens": ids.shape[1], "sha256": hashlib.sha256(data).hexdigest()}
