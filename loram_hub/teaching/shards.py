"""Stored targets: one safetensors file for each block of sequences, read by rows.

A shard `teacher-00000.safetensors` of n sequences of T tokens holds

    tokens     (n, T) int32       the sequences themselves
    token_ids  (n, T, k) int32    most probable next tokens, the most probable first
    log_probs  (n, T, k) float16  their log-probabilities over the whole vocabulary

and, in its header, which run it belongs to, its place, and the SHA-256 of its tensors. It is written aside, forced to
disk and renamed, so that a shard that has its name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from loram_hub.errors import CheckpointError, IncompatibleError, InvalidRequestError, VerificationError
from loram_hub.files import fsync_file, fsync_folder, resource_errors, sha256_of
from loram_hub.teaching.records import TEACHER, TeacherRecord, read_record
from loram_hub.tensors import TensorInfo, read_array, read_headers, read_rows

_MARK = "loram_teacher"  # one key: safetensors writes several in no fixed order
_MOST_PROBABILITY = 1.01
"""Most that k probabilities may add up to: rounding to fp16 changes each by up to 0.5 % where it is 1 in 20,000."""

TokenIds: TypeAlias = npt.NDArray[np.int32]
LogProbs: TypeAlias = npt.NDArray[np.float16]


def shard_name(block: int) -> str:
    """Name of a block's shard."""
    return f"teacher-{block:05d}.safetensors"


def write_shard(
    folder: Path, block: int, *, run: str, tokens: TokenIds, token_ids: TokenIds, log_probs: LogProbs
) -> None:
    """Write the shard of a block; it appears whole or not at all.

    Args:
        folder: of the run.
        block: its number.
        run: `TeacherRecord.run_digest`.
        tokens: (n, T).
        token_ids: (n, T, k).
        log_probs: (n, T, k).

    Raises:
        ResourceError: the disk is full or not writable.
    """
    tensors: dict[str, npt.NDArray[Any]] = {"tokens": tokens, "token_ids": token_ids, "log_probs": log_probs}
    mark = json.dumps({"block": block, "run": run, "sha256": _digest(tensors)}, sort_keys=True)
    part = folder / f".{shard_name(block)}.part"
    with resource_errors(f"Writing {folder / shard_name(block)}"):
        save_file(tensors, part, metadata={_MARK: mark})
        fsync_file(part)
        part.rename(folder / shard_name(block))
        fsync_folder(folder)


def is_written(folder: Path, block: int, *, run: str) -> bool:
    """Whether the shard of a block is there and holds what was written; reads all of it."""
    path = folder / shard_name(block)
    if not path.is_file():
        return False
    try:
        infos = read_headers(path)
        with safe_open(path, framework="np") as file:
            mark = json.loads((file.metadata() or {}).get(_MARK, "null"))
        found = {name: read_array(info) for name, info in infos.items()}
    except (VerificationError, ValueError):
        return False
    return set(found) == set(_NAMES) and mark == {"block": block, "run": run, "sha256": _digest(found)}


_NAMES = ("tokens", "token_ids", "log_probs")


def _digest(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in _NAMES:
        digest.update(f"{name}{tensors[name].dtype}{tensors[name].shape};".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


class TeacherShards:
    """A folder of stored targets; rows are read when they are asked for, nothing stays in memory."""

    def __init__(self, folder: Path, record: TeacherRecord) -> None:
        """Open all shards by their headers; see `open`."""
        self.folder, self.record = folder, record
        self._infos: list[Mapping[str, TensorInfo]] = []
        for block, entry in enumerate(record.shards):
            path = folder / shard_name(block)
            if not path.is_file() or path.stat().st_size != entry.size:
                raise CheckpointError(
                    f"{path} is missing or not {entry.size:,} bytes long, as {TEACHER} has it. Run loram teach again: "
                    "what is there is kept."
                )
            infos = read_headers(path)
            _check_header(path, infos, record, block)
            self._infos.append(infos)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        stream_digest: str | None = None,
        sequence_length: int | None = None,
        sequences: int | None = None,
    ) -> TeacherShards:
        """Open stored targets for a training stream.

        Args:
            folder: as `teach` wrote it.
            stream_digest: of the stream that will be trained on, `PackedStream.stream_digest`; None: not compared.
            sequence_length: of that stream; None: not compared.
            sequences: that will be trained on; None: not compared.

        Raises:
            CheckpointError: the folder is no finished run of `teach`, or lacks a shard.
            VerificationError: a file is damaged.
            IncompatibleError: the targets are of another stream, or of fewer sequences.
        """
        shards = cls(Path(folder).expanduser(), read_record(Path(folder).expanduser()))
        shards._check_stream(stream_digest, sequence_length, sequences)
        return shards

    @property
    def digest(self) -> str:
        """Hash of base, settings and stream, and of every shard."""
        return self.record.digest

    @property
    def k(self) -> int:
        """Tokens kept for each position."""
        return self.record.settings.k

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.record.settings.sequence_length

    @property
    def sequences(self) -> int:
        """Sequences with targets: those from 0 up to this number of the stream."""
        return self.record.settings.sequences

    def targets(self, first: int, count: int) -> tuple[TokenIds, LogProbs]:
        """Read the targets of sequences `first` to `first + count - 1`.

        Returns:
            Token ids and log-probabilities, both (count, T, k), the most probable first. Those at position t are for
            the token at t + 1.

        Raises:
            InvalidRequestError: the targets do not reach so far.
            VerificationError: an id is beyond the vocabulary, or probabilities are none.
        """
        token_ids = self._rows("token_ids", first, count)
        log_probs = self._rows("log_probs", first, count)
        self._check_ids(token_ids)
        values = log_probs.astype(np.float32)
        sums = np.exp(values).sum(axis=-1)
        if not np.isfinite(values).all() or (values > 0).any() or (sums > _MOST_PROBABILITY).any():
            raise self._damaged(f"log-probabilities of sequences {first} to {first + count - 1} are none")
        return token_ids, log_probs

    def tokens(self, first: int, count: int) -> TokenIds:
        """Read the sequences `first` to `first + count - 1` themselves, (count, T); raises as `targets` does."""
        tokens = self._rows("tokens", first, count)
        self._check_ids(tokens)
        return tokens

    def check_hashes(self) -> None:
        """Read every shard whole and compare it with its hash; raises `VerificationError`."""
        for block, entry in enumerate(self.record.shards):
            if sha256_of(self.folder / shard_name(block)) != entry.sha256:
                raise self._damaged(f"{shard_name(block)} has another SHA-256 than {TEACHER} says")

    def _rows(self, name: str, first: int, count: int) -> npt.NDArray[Any]:
        if first < 0 or count < 1 or first + count > self.sequences:
            raise InvalidRequestError(
                f"{self.folder} has targets of {self.sequences:,} sequences; {count:,} from number {first:,} were "
                "asked for. Train for fewer steps, or run loram teach with more sequences."
            )
        size, parts = self.record.settings.block_sequences, []
        for block in range(first // size, (first + count - 1) // size + 1):
            start = max(first - block * size, 0)
            stop = min(first + count - block * size, size)
            parts.append(read_rows(self._infos[block][name], start, stop))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _check_ids(self, ids: TokenIds) -> None:
        if ids.min() < 0 or ids.max() >= self.record.vocab_size:
            raise self._damaged(
                f"it has the token ids {ids.min()} to {ids.max()} in a vocabulary of {self.record.vocab_size:,}"
            )

    def _damaged(self, why: str) -> VerificationError:
        return VerificationError(f"{self.folder} is damaged: {why}. Delete the shards in question and run loram teach.")

    def _check_stream(self, stream_digest: str | None, sequence_length: int | None, sequences: int | None) -> None:
        settings = self.record.settings
        if sequence_length not in (None, settings.sequence_length):
            raise IncompatibleError(
                f"{self.folder} has targets of sequences of {settings.sequence_length:,} tokens, the training's have "
                f"{sequence_length:,}. Make the same length of both."
            )
        if stream_digest not in (None, self.record.stream_digest):
            corpora = ", ".join(f"{corpus.name}={corpus.weight:g}" for corpus in self.record.corpora)
            raise IncompatibleError(
                f"{self.folder} has targets of another stream of texts than the training's: the teacher read {corpora} "
                f"in sequences of {settings.sequence_length:,} tokens, seed {settings.seed}, {settings.held_out} held "
                f"out, shuffle_window {settings.shuffle_window}, at the revisions in {TEACHER}. Train on the same "
                "corpora, tokenizer and settings, or run loram teach for these."
            )
        if sequences is not None and sequences > settings.sequences:
            raise IncompatibleError(
                f"{self.folder} has targets of {settings.sequences:,} sequences, the training takes {sequences:,}. "
                "Train for fewer steps, or run loram teach with more sequences."
            )


def _check_header(path: Path, infos: Mapping[str, TensorInfo], record: TeacherRecord, block: int) -> None:
    settings = record.settings
    rows = min(settings.block_sequences, settings.sequences - block * settings.block_sequences)
    whole = (rows, settings.sequence_length)
    expected = {
        "tokens": ("I32", whole),
        "token_ids": ("I32", (*whole, settings.k)),
        "log_probs": ("F16", (*whole, settings.k)),
    }
    found = {name: (info.dtype, info.shape) for name, info in infos.items()}
    if found != expected:
        raise VerificationError(f"{path} holds {found!r:.200}; {expected} is what {TEACHER} says.")
