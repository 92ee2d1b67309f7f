"""Run the base over the training stream and store its targets, block by block; resumable, on one process or several."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.utils import tqdm
from transformers import AutoTokenizer

from loram_hub.architecture import Architecture
from loram_hub.checkpoint import CONFIG, Checkpoint, weight_files
from loram_hub.corpora import DEFAULT_CORPORA, Corpus, PackedStream, check_enough
from loram_hub.digests import remembered_sha256
from loram_hub.errors import CheckpointError, IncompatibleError, InvalidRequestError, ResourceError
from loram_hub.files import dump_json, refuse_existing, refuse_overlap, resource_errors, sha256_of
from loram_hub.hub import Source, check_base_checkpoint, resolve
from loram_hub.manifest import FileEntry
from loram_hub.streaming import check_device
from loram_hub.teaching.outputs import StreamedTeacher
from loram_hub.teaching.processes import Ranks, only_process, own_device, read_ranks
from loram_hub.teaching.records import (
    STARTED,
    TEACHER,
    TeacherRecord,
    differences,
    read_record,
    write_finished,
    write_started,
)
from loram_hub.teaching.settings import TeachingEstimate, TeachingSettings, teacher_bytes
from loram_hub.teaching.shards import TeacherShards, is_written, shard_name, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def teach(
    base: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    corpora: Sequence[Corpus] = DEFAULT_CORPORA,
    settings: TeachingSettings | None = None,
    device: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> TeacherShards | None:
    """Store the base's top-k log-probabilities for the first sequences of a training stream.

    The base is streamed layer by layer, once for each block of sequences, so memory does not grow with its depth; see
    `outputs` for the trade between memory and reading. Every block is a shard of its own: a run that was killed goes on
    with the first that is missing, on the same texts. Started by `torchrun`, process r of W takes the blocks r, r + W,
    ...; they need no connection, only one folder.

    Args:
        base: the base model: Hub id or folder with safetensors and tokenizer.
        out_dir: folder of the targets; a run that was begun there goes on.
        corpora: what the alignment will train on.
        settings: which targets, and how; None for the defaults.
        device: where to compute; None for the CPU. `cuda` is the process's own GPU under `torchrun`.
        overwrite: replace what another run, or anything else, has left in the folder.
        revision: of a base on the Hub.
        token: of the Hub.

    Returns:
        The targets; None in a process that is done while others still compute.

    Raises:
        InvalidRequestError: an argument is out of range, or the folder holds something else.
        IncompatibleError: another run was begun in the folder, or the base's weights or the texts have changed since.
        UnsupportedModelError: the base breaks the pattern of its family.
        AccessError: the Hub refused or could not be reached; run it again.
        ResourceError: disk or memory ran out, or another process writes the folder.

    Example:
        >>> from loram_hub import Corpus, teach  # doctest: +SKIP
        >>> teach("org/model", "model-teacher", corpora=[Corpus(source="texts.jsonl")])  # doctest: +SKIP
    """
    settings = settings or TeachingSettings()
    ranks = read_ranks()
    with _checked(
        base,
        out_dir,
        corpora=corpora,
        settings=settings,
        device=own_device(device),
        overwrite=overwrite,
        revision=revision,
        token=token,
    ) as job:
        teacher = StreamedTeacher(job.checkpoint, job.architecture, settings, job.device)
        _make_room(job, teacher.compute_type, ranks)
        with only_process(job.out, ranks.rank):
            record = _begin(job, teacher.compute_type, ranks.rank)
            _teach_blocks(job, teacher, record, ranks)
            return _finish(job.out, record, ranks.rank)


def check_teach(
    base: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    corpora: Sequence[Corpus] = DEFAULT_CORPORA,
    settings: TeachingSettings | None = None,
    device: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> TeachingEstimate:
    """Check all that `teach` checks before it computes, and write nothing. Arguments and errors are those of `teach`.

    The corpora are opened, and their first sequence is made.

    Returns:
        What would be read, held and written.
    """
    settings = settings or TeachingSettings()
    with _checked(
        base,
        out_dir,
        corpora=corpora,
        settings=settings,
        device=own_device(device),
        overwrite=overwrite,
        revision=revision,
        token=token,
    ) as job:
        teacher = StreamedTeacher(job.checkpoint, job.architecture, settings, job.device)
        if not _may_go_on(job, teacher.compute_type):
            refuse_existing(job.out, overwrite=overwrite)
            next(_open_stream(job, corpora))
        return TeachingEstimate(
            sequences=settings.sequences,
            tokens=settings.sequences * settings.sequence_length,
            blocks=settings.blocks,
            nbytes=teacher_bytes(settings.sequences, settings.sequence_length, settings.k),
            weight_bytes=settings.blocks * job.checkpoint.nbytes,
            hidden_bytes=min(settings.block_sequences, settings.sequences)
            * settings.sequence_length
            * job.architecture.hidden_size
            * getattr(torch, teacher.compute_type).itemsize,
        )


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class _Job:
    """A call whose arguments are sound."""

    source: Source
    checkpoint: Checkpoint
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    corpora: tuple[Corpus, ...]
    settings: TeachingSettings
    device: str
    out: Path
    overwrite: bool
    token: str | bool | None


@contextmanager
def _checked(
    base: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    corpora: Sequence[Corpus],
    settings: TeachingSettings,
    device: str,
    overwrite: bool,
    revision: str | None,
    token: str | bool | None,
) -> Iterator[_Job]:
    """Check everything that can fail before hours of streaming, and open the base."""
    out = Path(out_dir).expanduser()
    refuse_existing(out, overwrite=True)  # whether it may be replaced depends on what it holds
    check_device(device)
    check_enough(
        corpora,
        sequences=0 if settings.repeat else settings.sequences,
        sequence_length=settings.sequence_length,
        held_out=settings.held_out,
    )
    source = resolve(base, revision=revision, token=token)
    refuse_overlap(out, source.folder, *(corpus.path for corpus in corpora if corpus.is_local))
    with Checkpoint(source.folder) as checkpoint:
        architecture = check_base_checkpoint(checkpoint, source)
        if settings.k > architecture.vocab_size:
            raise InvalidRequestError(
                f"k is {settings.k}, the vocabulary of {source.id} has {architecture.vocab_size:,} tokens. Keep fewer."
            )
        _check_space(out, settings)
        yield _Job(
            source=source,
            checkpoint=checkpoint,
            architecture=architecture,
            tokenizer=_tokenizer(source),
            corpora=tuple(_located(corpus) for corpus in corpora),
            settings=settings,
            device=device,
            out=out,
            overwrite=overwrite,
            token=token,
        )


def _located(corpus: Corpus) -> Corpus:
    return replace(corpus, source=str(corpus.path.absolute())) if corpus.is_local else corpus


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder)
    except (OSError, ValueError) as err:
        raise CheckpointError(
            f"{source.folder} has no tokenizer that transformers can open, which texts need: {err} Add the base's."
        ) from err
    return tokenizer


def _check_space(out: Path, settings: TeachingSettings) -> None:
    """Fail at once where the disk cannot hold what is still to be written."""
    there = sum(path.stat().st_size for path in out.glob("teacher-*.safetensors")) if out.is_dir() else 0
    needed = teacher_bytes(settings.sequences, settings.sequence_length, settings.k) - there
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise ResourceError(
            f"The targets need another {needed:,} bytes, {above} has {free:,} left. Write elsewhere, or ask for fewer "
            f"sequences ({settings.sequences:,}) or a smaller k ({settings.k})."
        )


def _may_go_on(job: _Job, compute_type: str) -> bool:
    """Whether the folder holds this very run, begun or finished."""
    if not (job.out / STARTED).is_file():
        return False
    begun = read_record(job.out, STARTED)
    differ = differences(begun, _record(job, compute_type))
    if differ and not job.overwrite:
        raise IncompatibleError(
            f"Another run of the teacher was begun in {job.out}; these differ: {', '.join(differ)}. Ask for the same, "
            "choose another folder, or ask to overwrite it."
        )
    if differ:
        return False
    try:
        _open_begun(job, begun)
    except IncompatibleError:
        if job.overwrite:
            return False
        raise
    return True


def _record(job: _Job, compute_type: str) -> TeacherRecord:
    return TeacherRecord(
        base=_described(job.source),
        settings=job.settings,
        compute_type=compute_type,
        vocab_size=job.architecture.vocab_size,
        requested=job.corpora,
        corpora=job.corpora,
        stream_digest="",
    )


def _described(source: Source) -> dict[str, str | None]:
    """Name a base by its commit, or, where it has none, by the content of its weights."""
    described = {"id": source.id, "commit": source.commit, "config_sha256": sha256_of(source.folder / CONFIG)}
    if source.commit is not None:
        return described
    weights = {path.name: remembered_sha256(path) for path in weight_files(source.folder)}
    return {**described, "weights_sha256": hashlib.sha256(dump_json(weights).encode()).hexdigest()}


def _make_room(job: _Job, compute_type: str, ranks: Ranks) -> None:
    """Remove what is in the way of a new run, unless the folder holds this one."""
    if _may_go_on(job, compute_type) or _is_free(job.out):
        return
    # Another process of this run may have begun it between these two looks.
    if ranks.count > 1 and _may_go_on(job, compute_type):
        return
    _clear(job.out, ranks, overwrite=job.overwrite)


def _is_free(out: Path) -> bool:
    """Whether nothing is there; names with a dot are what a process leaves that was killed before it began a run."""
    return not out.exists() or (out.is_dir() and all(path.name.startswith(".") for path in out.iterdir()))


def _clear(out: Path, ranks: Ranks, *, overwrite: bool) -> None:
    refuse_existing(out, overwrite=overwrite)
    if ranks.count > 1:
        raise InvalidRequestError(
            f"{out} holds something else, which {ranks.count} processes cannot replace together. Delete it first."
        )
    with resource_errors(f"Replacing {out}"):
        shutil.rmtree(out)


def _open_stream(job: _Job, corpora: Sequence[Corpus]) -> PackedStream:
    settings = job.settings
    return PackedStream(
        corpora,
        job.tokenizer,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        held_out=settings.held_out,
        shuffle_window=settings.shuffle_window,
        repeat=settings.repeat,
        vocab_size=job.architecture.vocab_size,
        token=job.token,
    )


def _open_begun(job: _Job, record: TeacherRecord) -> PackedStream:
    """Open the stream of a run that was begun."""
    stream = _open_stream(job, record.corpora)
    if stream.stream_digest != record.stream_digest:
        raise IncompatibleError(
            f"The texts or the tokenizer have changed since the run in {job.out} was begun: its targets are of other "
            "texts. Restore them, choose another folder, or ask to overwrite it."
        )
    return stream


def _begin(job: _Job, compute_type: str, rank: int) -> TeacherRecord:
    """Pin the corpora, or find how the process that began has pinned them."""
    if not (job.out / STARTED).is_file():
        stream = _open_stream(job, job.corpora)
        pinned = replace(_record(job, compute_type), corpora=stream.pinned, stream_digest=stream.stream_digest)
        write_started(job.out, pinned, rank=rank)
    return read_record(job.out, STARTED)


def _teach_blocks(job: _Job, teacher: StreamedTeacher, record: TeacherRecord, ranks: Ranks) -> None:
    """Compute the blocks of this process that are not there yet."""
    blocks = range(ranks.rank, job.settings.blocks, ranks.count)
    missing = [block for block in blocks if not is_written(job.out, block, run=record.run_digest)]
    if not missing:
        return
    stream = _open_begun(job, record)  # compares once more: another process may have begun the run
    with tqdm(total=len(missing) * teacher.layers, desc="Teacher", unit="layer") as bar:
        for block in range(missing[-1] + 1):
            tokens = _next_block(stream, job.settings, block)
            if block in missing:
                token_ids, log_probs = teacher.targets(torch.from_numpy(tokens).long(), bar.update)
                write_shard(
                    job.out, block, run=record.run_digest, tokens=tokens, token_ids=token_ids, log_probs=log_probs
                )
                logger.info("targets of block %d of %d are written", block + 1, job.settings.blocks)


def _next_block(stream: PackedStream, settings: TeachingSettings, block: int) -> npt.NDArray[np.int32]:
    count = min(settings.block_sequences, settings.sequences - block * settings.block_sequences)
    return np.stack([next(stream).ids for _ in range(count)])


def _finish(out: Path, record: TeacherRecord, rank: int) -> TeacherShards | None:
    """Seal the folder if all shards are there: the process that is done last finds that they are."""
    paths = [out / shard_name(block) for block in range(record.settings.blocks)]
    absent = sum(not path.is_file() for path in paths)
    if absent:
        logger.info("%d of %d blocks are still being computed by other processes", absent, len(paths))
        return None
    shards = tuple(FileEntry(sha256=sha256_of(path), size=path.stat().st_size) for path in paths)
    finished = replace(record, shards=shards)
    if not (out / TEACHER).is_file() or read_record(out) != finished:
        write_finished(out, finished, rank=rank)
    return TeacherShards.open(out)
