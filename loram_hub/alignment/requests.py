"""What `align` is asked for: checked, and opened for reading."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loram_hub.alignment.runs import RunIdentity, identity_of
from loram_hub.alignment.settings import AlignmentSettings, Precision
from loram_hub.alignment.trackers import check_trackers
from loram_hub.corpora import Corpus, PackedStream, check_enough
from loram_hub.errors import IncompatibleError, InvalidRequestError
from loram_hub.files import refuse_overlap
from loram_hub.manifest import BaseModel
from loram_hub.release import Release, base_config_of
from loram_hub.teaching import TeacherShards
from loram_hub.teaching.records import read_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Resume = Literal["auto", "never"]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentRequest:
    """The arguments of `align`, but for the release."""

    out: Path
    """Folder to create."""
    run_folder: Path
    """Folder of log and checkpoints."""
    corpora: tuple[Corpus, ...]
    """What to train on."""
    settings: AlignmentSettings
    """How."""
    teacher: Path | None
    """Folder of the teacher's targets."""
    resume: Resume
    """Whether to go on from a checkpoint."""
    report_to: tuple[str, ...]
    """Trackers."""
    overwrite: bool
    """Whether `out` may be replaced."""
    token: str | bool | None
    """Of the Hub."""

    def check(self, source: Release, processes: int) -> None:
        """Check what can be told from release and arguments alone; see `align` for what is raised."""
        if self.resume not in ("auto", "never"):
            raise InvalidRequestError(f"resume is {self.resume!r}; choose 'auto' or 'never'.")
        if source.is_quantized:
            raise InvalidRequestError(
                f"{source.folder} is quantized, and NF4 weights cannot be trained. Align the unquantized release, then "
                "quantize the result."
            )
        self._check_settings(source, processes)
        read = [corpus.path for corpus in self.corpora if corpus.is_local]
        read += [] if self.teacher is None else [self.teacher]
        refuse_overlap(self.out, source.folder, *read)
        refuse_overlap(self.run_folder, source.folder, self.out, *(path for path in read if path.is_dir()))
        check_trackers(self.report_to)

    def _check_settings(self, source: Release, processes: int) -> None:
        settings = self.settings
        if settings.batch_size % processes:
            raise InvalidRequestError(
                f"batch_size {settings.batch_size} cannot be divided among {processes} processes; take a multiple of "
                f"{processes}."
            )
        longest = source.config.get("max_position_embeddings")
        if isinstance(longest, int) and settings.sequence_length > longest:
            raise InvalidRequestError(
                f"sequence_length is {settings.sequence_length}; the model has positions for {longest} tokens."
            )
        if (settings.distillation > 0) != (self.teacher is not None):
            raise InvalidRequestError(
                f"distillation is {settings.distillation} and teacher is {self.teacher}: the one needs the other. Make "
                "the teacher's targets with `loram teach`, or set distillation to 0."
            )

    def open_stream(self, source: Release, corpora: Sequence[Corpus]) -> PackedStream:
        """Open the training stream of this request over its corpora, pinned perhaps, and check that it can be enough.

        Datasets that are not pinned are read at the commits that the teacher has read, even if their branches have
        moved.
        """
        settings = self.settings
        stream = PackedStream(
            self._at_teacher_s_commits(corpora),
            _tokenizer(source),
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            held_out=settings.held_out,
            shuffle_window=settings.shuffle_window,
            repeat=settings.repeat,
            vocab_size=source.architecture.vocab_size,
            token=self.token,
        )
        if not settings.repeat:  # after a look at columns and texts: a file of something else is short of tokens too
            sequences = settings.steps * settings.batch_size
            length, held_out = settings.sequence_length, settings.held_out
            check_enough(corpora, sequences=sequences, sequence_length=length, held_out=held_out)
        return stream

    def open_teacher(self, source: Release, stream_sha256: str) -> TeacherShards | None:
        """Open the teacher's targets for a release and a training stream, if there are any."""
        if self.teacher is None:
            return None
        settings = self.settings
        shards = TeacherShards.open(
            self.teacher,
            stream_digest=stream_sha256,
            sequence_length=settings.sequence_length,
            sequences=settings.steps * settings.batch_size,
        )
        _check_teacher(shards, source.manifest.base)
        return shards

    def _at_teacher_s_commits(self, corpora: Sequence[Corpus]) -> tuple[Corpus, ...]:
        """Return the corpora, at the teacher's commits where they are those that the teacher was asked for."""
        if self.teacher is None:
            return tuple(corpora)
        record = read_record(self.teacher)
        if len(record.requested) != len(corpora):
            return tuple(corpora)
        return tuple(
            replace(corpus, revision=pinned.revision) if _is_what_was_asked(corpus, requested) else corpus
            for corpus, requested, pinned in zip(corpora, record.requested, record.corpora, strict=True)
        )

    def identity(self, source: Release, stream: PackedStream, precision: Precision) -> RunIdentity:
        """Say what decides over the result."""
        teacher = self.open_teacher(source, stream.stream_digest)
        return identity_of(source, stream, None if teacher is None else teacher.digest, self.settings, precision)


def request_of(
    out_dir: PathLike,
    *,
    corpora: Sequence[Corpus],
    settings: AlignmentSettings | None,
    teacher: PathLike | None,
    run_dir: PathLike | None,
    resume: Resume,
    report_to: Sequence[str],
    overwrite: bool,
    token: str | bool | None,
) -> AlignmentRequest:
    """Put the arguments of `align` together."""
    out = Path(os.path.abspath(Path(out_dir).expanduser()))
    return AlignmentRequest(
        out=out,
        run_folder=out.with_name(f"{out.name}-run") if run_dir is None else Path(run_dir).expanduser(),
        corpora=tuple(corpora),
        settings=settings or AlignmentSettings(),
        teacher=None if teacher is None else Path(teacher).expanduser(),
        resume=resume,
        report_to=tuple(report_to),
        overwrite=overwrite,
        token=token,
    )


def resolved_precision(settings: AlignmentSettings, device: torch.device) -> Precision:
    """Return what `auto` stands for on a device."""
    if settings.precision != "auto":
        return settings.precision
    return "mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _is_what_was_asked(corpus: Corpus, requested: Corpus) -> bool:
    is_same = corpus == replace(requested, weight=corpus.weight, revision=corpus.revision)
    return is_same and corpus.revision in (None, requested.revision) and not corpus.is_local


def _check_teacher(shards: TeacherShards, base: BaseModel) -> None:
    """Raise unless the teacher is the model that the release was pruned from; the name of a local copy may differ."""
    taught = shards.record.base
    is_other_commit = None not in (taught["commit"], base.commit) and taught["commit"] != base.commit
    if taught["config_sha256"] == base.config_sha256 and not is_other_commit:
        return
    raise IncompatibleError(
        f"{shards.folder} has targets of {_named(taught['id'], taught['commit'], taught['config_sha256'])}; the "
        f"release was pruned from {_named(base.id, base.commit, base.config_sha256)}. Run loram teach on that base."
    )


def _named(model: str, commit: str | None, config_sha256: str) -> str:
    return f"{model} ({'a local copy' if commit is None else f'commit {commit}'}, config.json {config_sha256[:12]})"


def _tokenizer(source: Release) -> PreTrainedTokenizerBase:
    # With the base's config: the release's own model type is unknown to transformers, which would say so.
    config = CONFIG_MAPPING[source.architecture.family.model_type].from_dict(base_config_of(source.config))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, config=config, local_files_only=True
        )
    except (OSError, ValueError) as err:
        raise InvalidRequestError(
            f"The tokenizer of {source.folder} cannot be opened: {err!s:.200}. Alignment needs the base's "
            "tokenizer in the release; prune a base that has one."
        ) from err
    return tokenizer
