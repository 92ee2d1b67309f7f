"""Examples on disk, as Arrow: written as they come, read by mapping the file, never all in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from loram_hub.errors import MissingDependencyError
from loram_hub.files import fsync_file, resource_errors, sha256_of
from loram_hub.instructions.examples import Example, Kind

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]  # ships no types


class ExampleWriter:
    """Writes examples of one kind to the cache of `datasets`, under the hash of what was written.

    Several processes may write the same examples at once: the first one's file stays, the others use it.
    """

    def __init__(self, kind: Kind) -> None:
        try:
            import datasets
            import pyarrow as pa  # type: ignore[import-untyped]  # ships no types
        except ImportError as err:
            raise MissingDependencyError("Fine-tuning data need datasets: pip install datasets") from err
        self._folder = Path(datasets.config.HF_DATASETS_CACHE) / "loram-instructions"
        self._schema = _schema(kind)
        with resource_errors(f"Writing to {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".part", dir=self._folder)
            os.close(handle)
            self._path = Path(name)
            self._sink: Any = pa.OSFile(name, "wb")
            self._writer: Any = pa.ipc.new_stream(self._sink, self._schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._path.unlink(missing_ok=True)

    def write(self, examples: Sequence[Example]) -> None:
        """Append examples."""
        import pyarrow as pa

        with resource_errors(f"Writing to {self._folder}"):
            rows = [dict(example.row) for example in examples]
            self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))

    def finish(self) -> Dataset:
        """Return what was written as a dataset."""
        import datasets

        with resource_errors(f"Writing to {self._folder}"):
            self._close()
            final = self._folder / f"{sha256_of(self._path)}.arrow"
            if not final.exists():
                fsync_file(self._path)  # or a power cut may leave the name with torn content, which all would use
                self._path.replace(final)
        return datasets.Dataset.from_file(str(final))

    def _close(self) -> None:
        if not self._sink.closed:
            self._writer.close()
            self._sink.close()


def stored_sha256(dataset: Dataset) -> str:
    """Return the SHA-256 of the examples that a data set was written with; a selection of its rows has the same."""
    return Path(dataset.cache_files[0]["filename"]).stem


def _schema(kind: Kind) -> Any:  # noqa: ANN401 (pyarrow ships no types)
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns = {
        "prompt-completion": {"prompt": pa.string(), "completion": pa.string()},
        "chat": {"prompt": messages, "completion": messages},
        "whole-chat": {"messages": messages},
        "text": {"text": pa.string()},
    }
    return pa.schema(list(columns[kind].items()))
