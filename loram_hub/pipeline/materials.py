"""What comes into the pipeline from outside: base model and data, each at one commit or with a hash of its content."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import metadata_load

from loram_hub.architecture import Architecture, architecture_of
from loram_hub.checkpoint import COMPANIONS, read_config, weight_files
from loram_hub.corpora import Corpus
from loram_hub.corpora.files import find_files
from loram_hub.digests import remembered_sha256
from loram_hub.errors import InvalidRequestError, LoramError
from loram_hub.files import dump_json
from loram_hub.hub import Source, resolve
from loram_hub.hub.fetching import is_fetched
from loram_hub.hub.revisions import dataset_commit
from loram_hub.licences import Licence, declared_licence, licence_documents, licence_of
from loram_hub.pipeline.recipe import Recipe
from loram_hub.texts import SUFFIXES

logger = logging.getLogger(__name__)

_DESCRIPTION = ("*.json", "README.md", *COMPANIONS)
"""What is fetched of a base before anything is done: everything but its weights."""
LICENSE = "LICENSE"
"""Name under which a licence text that a recipe adds travels along."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Materials:
    """Base and data of a recipe, pinned."""

    base: Source
    """The base's folder, which may lack the weights as yet."""
    architecture: Architecture
    licence: Licence
    """The base's."""
    licence_texts: Mapping[str, str]
    """Licence files by name: the base's, and the one that the recipe adds."""
    calibration: str | None
    """As `read_texts` takes it."""
    corpora: tuple[Corpus, ...]
    data: str | None
    """What is evaluated on."""
    digests: Mapping[str, str]
    """What each of them is, by name: base, calibration, corpora, data."""
    pins: Mapping[str, str]
    """Commits of what was named without one."""

    @property
    def has_weights(self) -> bool:
        """Whether the base's weights are on this machine."""
        try:
            return bool(weight_files(self.base.folder))
        except LoramError:
            return False


def find_materials(recipe: Recipe, pins: Mapping[str, str], *, token: str | bool | None) -> Materials:
    """Look up everything that a recipe names; what has no commit gets the one of `pins`, else that of today.

    Args:
        recipe: what is named.
        pins: commits of an earlier run.
        token: of the Hub.

    Raises:
        LoramError: something does not exist or cannot be reached, or the base is of no known family or licence.
    """
    finder = _Finder(dict(pins), token)
    base = finder.base(recipe)
    align, evaluate = recipe.align, recipe.evaluate
    # Importance without gradients needs no calibration, but a refit may.
    calibration = finder.texts("calibration", recipe.prune.calibration)
    corpora = tuple(map(finder.corpus, align.corpora)) if align is not None else ()
    data = finder.texts("data", evaluate.data if evaluate is not None else None)
    texts = _licence_texts(base, recipe.license_file)
    finder.digests["licence texts"] = hashlib.sha256(dump_json(texts).encode()).hexdigest()
    if corpora:
        finder.digests["corpora"] = hashlib.sha256("\n".join(map(_identity, corpora)).encode()).hexdigest()
    return Materials(
        base=base,
        architecture=architecture_of(read_config(base.folder)),
        licence=_licence(base, recipe.license, texts),
        licence_texts=texts,
        calibration=calibration,
        corpora=corpora,
        data=data,
        digests=finder.digests,
        pins=finder.used,
    )


class _Finder:
    """Looks things up and remembers at which commit."""

    def __init__(self, known: dict[str, str], token: str | bool | None) -> None:
        self._known, self._token = known, token
        self.used: dict[str, str] = {}
        self.digests: dict[str, str] = {}

    def base(self, recipe: Recipe) -> Source:
        pin = f"model {recipe.base} at {recipe.revision}"
        local = _existing("base", recipe.base)
        if local is not None and local.is_dir():
            source = resolve(recipe.base)
            self.digests["base"] = source.commit or _folder_digest(source.folder, only=is_fetched)
            return source
        source = resolve(
            recipe.base, revision=self._known.get(pin, recipe.revision), token=self._token, files=_DESCRIPTION
        )
        assert source.commit is not None
        self.used[pin] = self.digests["base"] = source.commit
        return source

    def texts(self, name: str, spec: str | None) -> str | None:
        """Pin a specification of texts."""
        if spec is None:
            return None
        local = _existing(name, spec)
        if local is not None:
            self.digests[name] = _folder_digest(local)
            return spec
        dataset, _, revision = spec.partition("@")
        if Path(spec).suffix in SUFFIXES:
            raise InvalidRequestError(f"{name} is {spec!r}, which is no existing file.")
        commit = self._commit(dataset.partition(":")[0], revision or None)
        self.digests[name] = f"{dataset}@{commit}"
        return f"{dataset}@{commit}"

    def corpus(self, corpus: Corpus) -> Corpus:
        if corpus.is_local:
            return corpus
        return replace(corpus, revision=self._commit(corpus.source, corpus.revision))

    def _commit(self, dataset: str, revision: str | None) -> str:
        if revision is not None and _COMMIT.fullmatch(revision):
            return revision
        pin = f"dataset {dataset} at {revision}"
        commit = self._known.get(pin) or dataset_commit(dataset, revision=revision, token=self._token)
        self.used[pin] = commit
        return commit


def _identity(corpus: Corpus) -> str:
    """Name a corpus by its content, its column and its share; where it lies does not matter."""
    content = _corpus_digest(corpus) if corpus.is_local else f"{corpus.name}@{corpus.revision}/{corpus.split}"
    return f"{content} {corpus.column} {corpus.weight}"


def _corpus_digest(corpus: Corpus) -> str:
    """Hash every file of a local corpus; names count where they decide over the order."""
    files = find_files(corpus)
    found = hashlib.sha256(files.builder.encode())
    for path in files.paths:
        name = path.relative_to(files.root).as_posix() if corpus.path.is_dir() else ""
        found.update(f"{name}\0{remembered_sha256(path)}\0".encode())
    return found.hexdigest()


def _existing(name: str, spec: str) -> Path | None:
    """Return the path that a text names; None if there is none, and it may be a Hub id."""
    try:
        path = Path(spec).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as err:
        raise InvalidRequestError(
            f"{name} is {spec!r:.80}, which is neither a path nor a Hub id: {getattr(err, 'strerror', None) or err}."
        ) from err


def _folder_digest(path: Path, *, only: Callable[[str], bool] = lambda _: True) -> str:
    """Hash a file, or names and contents of all files below a folder; what is remembered is not read again."""
    if path.is_file():
        return remembered_sha256(path)
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and only(file.relative_to(path).as_posix()):
            found.update(f"{file.relative_to(path).as_posix()}\0{remembered_sha256(file)}\0".encode())
    return found.hexdigest()


def _licence_texts(base: Source, added: str | None) -> dict[str, str]:
    found = licence_documents(base.folder)
    if added is None:
        return found
    own = [name for name in found if name.upper().startswith("LICENSE")]
    if own:
        raise InvalidRequestError(f"license_file is given, but {base.id} has a {own[0]} of its own. Leave it out.")
    try:
        return found | {LICENSE: Path(added).expanduser().read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidRequestError(f"license_file {added} cannot be read as text: {err}.") from err


def _licence(base: Source, declared: str | None, texts: Mapping[str, str]) -> Licence:
    """Find the base's licence by what the recipe, its card, its licence file and its name say."""
    card = base.folder / "README.md"
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except ValueError as err:
        logger.warning("The metadata of %s cannot be read: %s", card, err)
        metadata = {}
    return licence_of(base.id, declared=declared, on_card=declared_licence(metadata), documents=texts)
