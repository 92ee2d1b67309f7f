"""Corpora opened: files found, datasets on the Hub pinned to a commit, rows streamed through `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from glob import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from weakref import finalize

from loram_hub.corpora.corpus import Corpus
from loram_hub.corpora.failures import opening_errors, reading_errors
from loram_hub.corpora.files import BUILDERS, CorpusFiles, find_files, suffix_of
from loram_hub.errors import InvalidRequestError, MissingDependencyError
from loram_hub.hub.access import access_errors, clean_token, persistently

if TYPE_CHECKING:
    from datasets import Features, IterableDataset  # type: ignore[import-untyped]  # ships no types
    from datasets.packaged_modules.parquet.parquet import Parquet  # type: ignore[import-untyped]

DatasetState = Mapping[str, Any]
"""Where `datasets` stands in a dataset, in its own terms: a small JSON object."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_ROWS_AT_A_TIME = 256
"""Rows that are taken out of a row group of a parquet file at once."""
_LOCAL_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "text": {"sample_by": "document", "encoding": "utf-8-sig"},
    "json": {"chunksize": 1024 * 1024},
}
"""Options of `datasets` by kind of file."""


class OpenCorpus:
    """A corpus that can be read from any place it has been at.

    Args:
        corpus: what to read.
        token: for private and gated datasets; None: the one that is logged in.

    Raises:
        InvalidRequestError: there is no such file, configuration, split or column, or the column holds no text.
        VerificationError: a file is damaged.
        AccessError: the dataset does not exist or is closed, or the Hub cannot be reached.
        MissingDependencyError: `datasets` is not installed.
    """

    def __init__(self, corpus: Corpus, *, token: str | bool | None = None) -> None:
        if find_spec("datasets") is None:
            raise MissingDependencyError(f"Reading the corpus {corpus.name} needs: pip install datasets")
        self.files = find_files(corpus) if corpus.is_local else None
        self.corpus = corpus if self.files is not None else _pin(corpus, token)
        with opening_errors(self.corpus):
            self._dataset = _open_dataset(self.corpus, self.files, token)
        # The one iterator in use. Those of `datasets` complain if they are still alive when the interpreter has gone.
        self._live: list[Iterator[Mapping[str, object]]] = []
        finalize(self, self._live.clear)

    def rows(self, state: DatasetState | None) -> Iterator[str | None]:
        """Yield the values of the text column from a place on; None: from the beginning. One call ends the one before.

        Raises:
            VerificationError: a file is damaged.
            AccessError: the network failed; reading can go on later from `state`.
            InvalidRequestError: the column is missing in a file, or holds something else than text.
        """
        self._dataset.load_state_dict(state)
        column = self.corpus.column
        self._live[:] = [iter(self._dataset)]
        while True:
            with reading_errors(self.corpus, self._file_in_hand):
                row = next(self._live[0], None)
            if row is None:
                return
            if column not in row:
                raise _missing_column(self.corpus, list(row))
            text = row[column]
            if text is not None and not isinstance(text, str):
                raise _no_text(self.corpus, type(text).__name__, list(row))
            yield text

    def state(self) -> DatasetState:
        """Return the place behind the row that was yielded last."""
        state: DatasetState = self._dataset.state_dict()
        return state

    def _file_in_hand(self) -> str:
        """Name the file that is being read, for messages."""
        state: Any = self._dataset.state_dict()
        while isinstance(state, Mapping) and "examples_iterable" in state:
            state = state["examples_iterable"]
        idx = state.get("shard_idx") if isinstance(state, Mapping) else None
        if self.files is None or not isinstance(idx, int) or idx >= len(self.files.paths):
            return ""
        return f", in {self.files.paths[idx].relative_to(self.files.root)}"


def _pin(corpus: Corpus, token: str | bool | None) -> Corpus:
    """Return the corpus with its revision resolved to a commit."""
    from huggingface_hub import HfApi

    if not _HUB_ID.fullmatch(corpus.source) or suffix_of(corpus.path) in BUILDERS:
        raise InvalidRequestError(
            f"The corpus {corpus.source!r} is no existing file or folder, and no Hub dataset id (org/name) either."
        )
    api = HfApi(token=clean_token(token))
    with access_errors(corpus.source):
        info = persistently(lambda: api.dataset_info(corpus.source, revision=corpus.revision))
    return replace(corpus, revision=info.sha)


def _open_dataset(corpus: Corpus, files: CorpusFiles | None, token: str | bool | None) -> IterableDataset:
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    if files is not None:
        paths = [escape(str(path.absolute())) for path in files.paths]
        options = _LOCAL_OPTIONS.get(files.builder, {})
        builder = datasets.load_dataset_builder(files.builder, data_files={"train": paths}, **options)
    else:
        builder = datasets.load_dataset_builder(
            corpus.source, corpus.config, revision=corpus.revision, token=clean_token(token)
        )
    dataset = builder.as_streaming_dataset(split=corpus.split)
    if dataset.features is not None:
        _check_column(corpus, dataset.features)
    if isinstance(builder, Parquet):
        _read_frugally_(builder, corpus.column)
        dataset = builder.as_streaming_dataset(split=corpus.split)
    return dataset


def _read_frugally_(builder: Parquet, column: str) -> None:
    """Let a parquet reader fetch the text column alone, and one row group at a time.

    Given a whole file, pyarrow decodes as far ahead as it gets before anyone asks: gigabytes, of the files of large
    datasets.
    """
    generate, split_up = builder._generate_tables, builder._generate_more_gen_kwargs

    def generate_by_row_group(files: list[str], row_groups_list: list[Any]) -> Iterator[Any]:
        for groups in split_up(files=files, row_groups_list=row_groups_list):
            yield from generate(**groups)

    builder.config.columns, builder.config.batch_size = [column], _ROWS_AT_A_TIME
    builder._generate_tables = generate_by_row_group


def _check_column(corpus: Corpus, features: Features) -> None:
    """Raise unless the column exists and holds strings."""
    columns = list(features)
    if corpus.column not in features:
        raise _missing_column(corpus, columns)
    feature = features[corpus.column]
    dtype = getattr(feature, "dtype", None) or type(feature).__name__
    if dtype not in ("string", "large_string", "null"):  # null: nothing but blanks so far
        raise _no_text(corpus, dtype, columns)


def _missing_column(corpus: Corpus, columns: list[str]) -> InvalidRequestError:
    near = get_close_matches(corpus.column, columns, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Name the one with the texts as the corpus's column."
    return InvalidRequestError(
        f"The corpus {corpus.name} has no column {corpus.column!r}; its columns are: {', '.join(columns)}. {hint}"
    )


def _no_text(corpus: Corpus, kind: str, columns: list[str]) -> InvalidRequestError:
    return InvalidRequestError(
        f"The column {corpus.column!r} of the corpus {corpus.name} holds {kind}, not text. Its columns are: "
        f"{', '.join(columns)}."
    )
