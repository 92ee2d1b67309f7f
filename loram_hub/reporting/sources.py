"""What the names stand for that a report is asked for. Folders are told by what they hold; nothing is believed yet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loram_hub.adapter import CONFIG as ADAPTER_CONFIG
from loram_hub.alignment.runs import LOG_FILE
from loram_hub.errors import CheckpointError
from loram_hub.finetuning.runs import RECORD_FILE, RUN_FILE
from loram_hub.hub import ADAPTER_FILES, METADATA_FILES, resolve
from loram_hub.release import is_release

Kind = Literal["release", "adapter", "run", "alignment run", "work folder", "demo", "study", "evaluation"]

IMPORTANCE_FILE = "importance.safetensors"
EVALUATION_FILE = "evaluation.json"
DEMO_RECORD = "report.json"
STUDY_ROWS = "results.jsonl"
STAGE_RECORDS = ".publish"

_ACCEPTED = (
    "a release, an adapter, the folder of a fine-tuning run, the work folder of 'loram publish', the run folder of "
    "'loram align', the folder of a study, or the JSON of 'loram eval'"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a name stands for."""

    kind: Kind
    path: Path
    """Folder, or file of an evaluation."""
    id: str
    """Hub id, or the name of folder or file: no path gets into a report."""
    commit: str | None = None
    """On the Hub; None for what is local."""
    release: Path | None = None
    """Of the adapter of a run: the release that it was trained on, if that is a folder here."""


def find(name: str | os.PathLike[str], *, token: str | bool | None = None) -> Found:
    """Find out what a name stands for; of a Hub id configs, mask indexes and the factors of an adapter are fetched.

    Args:
        name: folder, file or Hub id.
        token: of the Hub.

    Raises:
        CheckpointError: it is nothing that a report can be made of.
        AccessError: the Hub refused or could not be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _file(path)
    if path.is_dir():
        kind = _kind_of(path)
        if kind in ("release", "adapter"):  # which may lie in the cache of the Hub
            source = resolve(path)
            return Found(kind=kind, path=source.folder, id=source.id, commit=source.commit)
        if kind is not None:
            return Found(kind=kind, path=path, id=Path(os.path.abspath(path)).name)
        if (path / RUN_FILE).is_file():
            raise CheckpointError(f"{path} is a fine-tuning run that has come to no checkpoint yet. Try again later.")
        raise CheckpointError(f"{path} holds nothing that a report can be made of. Give {_ACCEPTED}.")
    wanted = tuple(dict.fromkeys((*METADATA_FILES, *ADAPTER_FILES)))
    source = resolve(name, token=token, files=wanted)
    kind = _kind_of(source.folder)
    if kind not in ("release", "adapter"):
        raise CheckpointError(f"{name} on the Hub is neither a release nor an adapter. Give {_ACCEPTED}.")
    return Found(kind=kind, path=source.folder, id=source.id, commit=source.commit)


def _file(path: Path) -> Found:
    if path.name == STUDY_ROWS:
        return Found(kind="study", path=path.parent, id=Path(os.path.abspath(path)).parent.name)
    if path.suffix == ".json":
        return Found(kind="evaluation", path=path, id=path.name)
    if path.name == IMPORTANCE_FILE or path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is no source of its own. Give the folder that it lies in, or a release and importance scores with "
            "--importance."
        )
    raise CheckpointError(f"{path} is nothing that a report can be made of. Give {_ACCEPTED}.")


def _kind_of(folder: Path) -> Kind | None:
    holds = {entry.name for entry in folder.iterdir()}
    tests: tuple[tuple[Kind, bool], ...] = (
        ("study", STUDY_ROWS in holds),
        ("work folder", STAGE_RECORDS in holds),
        ("alignment run", LOG_FILE in holds),
        ("run", RECORD_FILE in holds or {RUN_FILE, "checkpoints"} <= holds),
        ("release", is_release(folder)),
        ("adapter", ADAPTER_CONFIG in holds),
        ("demo", {DEMO_RECORD, "release"} <= holds),
    )
    return next((kind for kind, applies in tests if applies), None)
