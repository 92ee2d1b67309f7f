"""`align`: train a pruned release further, in as many processes as were started, and write the aligned release."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

import torch

from loram_hub.alignment.batches import BatchFeed
from loram_hub.alignment.checkpoints import CheckpointStore
from loram_hub.alignment.estimates import AlignmentEstimate, estimate
from loram_hub.alignment.launch import Ranks, check_precision, joined_ranks
from loram_hub.alignment.masking import gradient_masks
from loram_hub.alignment.model import sharded_model
from loram_hub.alignment.optimization import check_optimizer
from loram_hub.alignment.requests import AlignmentRequest, Resume, request_of, resolved_precision
from loram_hub.alignment.results import aligned_manifest, corpus_names, is_result, write_aligned
from loram_hub.alignment.runs import RunFolder, RunIdentity
from loram_hub.alignment.settings import AlignmentSettings, Precision
from loram_hub.alignment.trackers import Tracker, open_trackers
from loram_hub.alignment.training import Ids, Material, Training
from loram_hub.corpora import DEFAULT_CORPORA, Corpus, PackedStream
from loram_hub.files import refuse_existing
from loram_hub.hub import fetch_release
from loram_hub.release import Release, open_release
from loram_hub.teaching import TeacherShards

logger = logging.getLogger(__name__)


def align(
    release: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    corpora: Sequence[Corpus] = DEFAULT_CORPORA,
    settings: AlignmentSettings | None = None,
    teacher: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: Resume = "auto",
    report_to: Sequence[str] = (),
    device: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Release:
    """Train the pruned weights of a release further on general text (LoRAM, eq. 8), and write the aligned release.

    The removed weights of a sparse release stay 0, exactly.

    Every process that `torchrun` or `accelerate launch` has started calls this with the same arguments; without them
    it runs in one process. A run that was cut off goes on from its last checkpoint when it is started again, on
    another number of processes if wanted. A run that is done already returns at once.

    Args:
        release: folder or Hub id; not quantized.
        out_dir: folder to create.
        corpora: what to train on.
        settings: how; None for the paper's.
        teacher: folder made by `teach` from the same base, corpora and settings; needed if `settings.distillation` > 0.
            Datasets are read at the commits that the teacher has read.
        run_dir: folder of log, curves and checkpoints, seen by all processes; None for `out_dir` with `-run` added.
        resume: `auto` goes on from the newest checkpoint, `never` starts anew.
        report_to: trackers: `trackio`, `wandb`, `tensorboard`.
        device: `cuda` or `cpu`; None for CUDA where torch sees a GPU.
        overwrite: replace an existing folder.
        revision: of a Hub id.
        token: of the Hub, for the release and the corpora.

    Returns:
        The aligned release, on every process.

    Raises:
        InvalidRequestError: the release is NF4, settings and release or corpora do not go together, the launch is not
            what was asked for, or `run_dir` is another run's.
        TrainingError: loss or weights are not finite, or another process ended.
        ResourceError: memory or disk ran out.
        AccessError: the Hub refused or could not be reached.
        LoramError: what the release, the corpora or the teacher raise.

    Example:
        >>> align("org/base-LoRAM-0.65", "aligned", settings=AlignmentSettings(steps=200))  # doctest: +SKIP
    """
    request = request_of(
        out_dir, corpora=corpora, settings=settings, teacher=teacher, run_dir=run_dir, resume=resume,
        report_to=report_to, overwrite=overwrite, token=token,
    )  # fmt: skip
    with joined_ranks(processes=request.settings.processes, device=device) as ranks:

        def fetch() -> Release:
            return fetch_release(release, revision=revision, token=token)[1]

        ranks.everywhere(lambda: fetch() if ranks.local_rank == 0 else None)  # one download a machine
        source = ranks.everywhere(fetch)
        precision = resolved_precision(request.settings, ranks.device)
        ranks.everywhere(lambda: _check(request, source, ranks, precision))
        with closing(_Run(request, source, ranks, precision)) as run:
            if not run.is_done():
                run.train()
            run.clear()
        return ranks.everywhere(lambda: open_release(request.out))


def check_align(
    release: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    corpora: Sequence[Corpus] = DEFAULT_CORPORA,
    settings: AlignmentSettings | None = None,
    teacher: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: Resume = "auto",
    report_to: Sequence[str] = (),
    device: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AlignmentEstimate:
    """Check all that `align` checks before it trains, and write nothing. Arguments and errors are those of `align`.

    Returns:
        What would be trained, and the bytes that each of `settings.processes` processes (None: one) would hold.
    """
    request = request_of(
        out_dir, corpora=corpora, settings=settings, teacher=teacher, run_dir=run_dir, resume=resume,
        report_to=report_to, overwrite=overwrite, token=token,
    )  # fmt: skip
    source = fetch_release(release, revision=revision, token=token)[1]
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = resolved_precision(request.settings, place)
    processes = request.settings.processes or 1
    request.check(source, processes)
    check_optimizer(request.settings, place)
    folder, goes_on = RunFolder(request.run_folder), request.resume == "auto"
    stream = request.open_stream(source, folder.pinned(request.corpora) if goes_on else request.corpora)
    identity = request.identity(source, stream, precision)
    if goes_on:
        folder.check(identity)
    if not (goes_on and is_result(request.out, identity.digest)):
        refuse_existing(request.out, overwrite=overwrite)
    return estimate(source.plan, request.settings, precision=precision, processes=processes)


def _check(request: AlignmentRequest, source: Release, ranks: Ranks, precision: Precision) -> None:
    request.check(source, ranks.size)
    check_precision(os.environ, precision)
    check_optimizer(request.settings, ranks.device)


class _Run:
    """One run: what the first process holds for it, and what all do together."""

    def __init__(self, request: AlignmentRequest, source: Release, ranks: Ranks, precision: Precision) -> None:
        self._request, self._source, self._ranks, self._precision = request, source, ranks, precision
        self._folder = RunFolder(request.run_folder)
        self._store = CheckpointStore(
            self._folder.checkpoints, keep=request.settings.keep_checkpoints, process_group=ranks.control
        )
        self._held = ExitStack()
        self._stream: PackedStream | None = None  # on the first process
        self._tracker: Tracker | None = None  # on the first process

    def close(self) -> None:
        """Let go of the run's folder."""
        self._held.close()

    def clear(self) -> None:
        """Delete the checkpoints of a run that is done."""
        self._store.clear()

    def is_done(self) -> bool:
        """Lock the run's folder, and look whether its result is there."""
        self._ranks.first(self._lock)
        if self._request.resume == "never":
            self._store.clear()  # before the log goes: checkpoints without a log would be of no use
        self._identity, is_done, self._held_out = self._ranks.first(self._begin)
        return is_done

    def train(self) -> None:
        """Train from where the run stands to its end, and write the release."""
        request, ranks, source = self._request, self._ranks, self._source
        model = sharded_model(source, request.settings, ranks, precision=self._precision)
        feed = BatchFeed(self._stream, batch_size=request.settings.batch_size, ranks=ranks)
        teacher = ranks.everywhere(lambda: request.open_teacher(source, self._identity.stream_sha256))
        training = Training(
            model,
            self._material(feed, teacher),
            request.settings,
            masks=ranks.everywhere(lambda: gradient_masks(source, model, ranks)),
            ranks=ranks,
            store=self._store,
            run_sha256=self._identity.digest,
            record=self._record,
        )
        with closing(feed):
            step = training.resume()
            ranks.first(lambda: self._begin_log(step))
            training.run()
        ranks.first(self._folder.draw)
        manifest = aligned_manifest(
            source.manifest,
            request.settings,
            corpora=ranks.first(self._pinned),
            records=ranks.first(self._folder.log.read),
            run_sha256=self._identity.digest,
            teacher=teacher,
        )
        trained = training.optimizer.parameters
        write_aligned(source, trained, request.out, manifest=manifest, ranks=ranks, overwrite=request.overwrite)
        if ranks.is_first:
            logger.info("Wrote the aligned release to %s", request.out)

    def _lock(self) -> None:
        request = self._request
        if request.resume == "never":
            refuse_existing(request.out, overwrite=request.overwrite)
        self._held.enter_context(self._folder.locked())

    def _begin(self) -> tuple[RunIdentity, bool, tuple[Ids, ...]]:
        request, folder = self._request, self._folder
        goes_on = request.resume == "auto"
        stream = request.open_stream(self._source, folder.pinned(request.corpora) if goes_on else request.corpora)
        identity = request.identity(self._source, stream, self._precision)
        is_done = goes_on and is_result(request.out, identity.digest)
        if not is_done:
            refuse_existing(request.out, overwrite=request.overwrite)
            if not goes_on:
                folder.forget()
            folder.begin(identity, request.corpora, stream.pinned)
        self._stream = stream
        return identity, is_done, stream.held_out

    def _material(self, feed: BatchFeed, teacher: TeacherShards | None) -> Material:
        return Material(names=corpus_names(self._request.corpora), feed=feed, held_out=self._held_out, teacher=teacher)

    def _begin_log(self, step: int) -> None:
        """Bring the log to where the checkpoint is; open the trackers."""
        request = self._request
        self._folder.cut_log(step or -1)
        if step:
            logger.info("Going on after step %d of %d", step, request.settings.steps)
        self._tracker = open_trackers(
            request.report_to,
            project=f"loram-align-{request.out.name}",
            name=self._identity.digest[:12],
            config=request.settings.to_dict(),
            folder=request.run_folder / "tensorboard",
        )
        self._held.callback(self._tracker.finish)

    def _record(self, measured: Mapping[str, object]) -> None:
        self._folder.record(measured)
        if self._tracker is not None:
            values = {key: value for key, value in measured.items() if key != "step"}
            self._tracker.log(int(str(measured["step"])), values)

    def _pinned(self) -> tuple[Corpus, ...]:
        assert self._stream is not None
        return self._stream.pinned
