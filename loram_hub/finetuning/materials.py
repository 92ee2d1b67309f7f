"""What a recipe names, opened: the release without its weights, its tokenizer, the modules to adapt."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loram_hub.adapter import LM_HEAD_MODULE, linear_modules, module_shape
from loram_hub.checkpoint import COMPANIONS, CONFIG
from loram_hub.errors import CheckpointError, InvalidRequestError, UnsupportedAdapterError
from loram_hub.finetuning.recipe import ALL_PROJECTIONS, MASKED_BY_DEFAULT, DataSection, FinetuneRecipe
from loram_hub.hub import METADATA_FILES, Source, find_base, resolve
from loram_hub.instructions import check_tokenizer
from loram_hub.release import Release, open_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Materials:
    """What a run starts from."""

    source: Source
    """The release: folder, id, commit."""
    release: Release
    """Its manifest and plan."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    targets: tuple[str, ...]
    """Modules that get an adapter, by last name or full path, ascending."""
    modules: tuple[str, ...]
    """Full paths of them."""
    is_masked: bool
    """Whether the update is masked; on a sparse release alone."""
    foreign_template: str | None
    """Chat template of a tokenizer that the recipe named, where it is not the release's."""

    @property
    def name(self) -> str:
        """How the release is opened again: at its commit, if it is from the Hub."""
        return self.source.id if self.source.commit is not None else str(self.source.folder)

    def adapter_parameters(self, r: int, *, recovered: bool = False) -> int:
        """Count the numbers of an adapter of rank `r`, in pruned or in full size."""
        architecture, layers = self.release.architecture, () if recovered else self.release.plan.layers
        shapes = [module_shape(architecture, module, layers) for module in self.modules]
        return sum(r * (shape[0] + shape[1]) for shape in shapes if shape is not None)


def open_materials(recipe: FinetuneRecipe, *, token: str | bool | None = None) -> Materials:
    """Open what a recipe names; of a release on the Hub, no weights are fetched.

    Args:
        recipe: what is asked for.
        token: of the Hub.

    Raises:
        CheckpointError: there is no such release, or it has no tokenizer.
        VerificationError: the release was altered or torn.
        IncompatibleError: it was not made from `recipe.base`.
        InvalidRequestError: it has no such module as is targeted, or nothing to mask.
        UnsupportedAdapterError: the lm_head is targeted.
        AccessError: the Hub refused or could not be reached.
    """
    files = (*METADATA_FILES, *COMPANIONS)
    source = resolve(recipe.release, revision=recipe.revision, token=token, files=files)
    release = open_metadata(source.folder)
    if recipe.base is not None:
        find_base(release, recipe.base, token=token)
    is_masked = _is_masked(recipe, release, source.id)
    modules = _targeted(recipe.lora.targets, release, source.id)
    own = _open_tokenizer(source)
    tokenizer = own if recipe.data.tokenizer is None else _named_tokenizer(recipe.data, source, token)
    return Materials(
        source=source,
        release=release,
        tokenizer=tokenizer,
        targets=_names(recipe.lora.targets, release),
        modules=modules,
        is_masked=is_masked,
        foreign_template=None if _template(tokenizer) == _template(own) else _template(tokenizer),
    )


def _is_masked(recipe: FinetuneRecipe, release: Release, name: str) -> bool:
    asked = recipe.lora.masked
    is_sparse = release.manifest.is_sparse
    if asked and not is_sparse:
        raise InvalidRequestError(
            f"lora.masked is true, and {name} is a structured release: what was pruned is not there, so that there is "
            "nothing to mask. Leave it out, or name a sparse release."
        )
    return is_sparse and (MASKED_BY_DEFAULT if asked is None else asked)


def _named_tokenizer(data: DataSection, source: Source, token: str | bool | None) -> PreTrainedTokenizerBase:
    assert data.tokenizer is not None
    tokenizer = _open_tokenizer(resolve(data.tokenizer, token=token, files=(CONFIG, *COMPANIONS)))
    check_tokenizer(tokenizer, source.folder, allow_other=data.allow_other_tokenizer)
    return tokenizer


def _open_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not any(source.folder.glob("tokenizer*")):
        raise CheckpointError(
            f"{source.id} has no tokenizer: no file tokenizer* in {source.folder}. A release gets its base's: prune it "
            "again from a folder that has one."
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{source.folder} has no tokenizer that transformers can open: {err!s:.300}") from err
    return tokenizer


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that conversations are written with: where there are several, the one named `default`."""
    templates: str | dict[str, str] | None = tokenizer.chat_template
    return templates.get("default") if isinstance(templates, dict) else templates


def _names(targets: Sequence[str], release: Release) -> tuple[str, ...]:
    projections = {weight.module.rpartition(".")[2] for weight in release.architecture.projections}
    named = {target for target in targets if target != ALL_PROJECTIONS}
    return tuple(sorted(named | (projections if ALL_PROJECTIONS in targets else set())))


def _targeted(targets: Sequence[str], release: Release, name: str) -> tuple[str, ...]:
    """Return the paths of targeted modules; every target must hit one."""
    present = linear_modules(release.architecture)
    found: set[str] = set()
    for target in _names(targets, release):
        hit = {module for module in present if module == target or module.endswith(f".{target}")}
        if LM_HEAD_MODULE in hit:
            raise UnsupportedAdapterError(
                "lora.targets names the lm_head. TRL computes the loss from its weight directly, so that an adapter "
                "on it would never be trained, and servers refuse one. Leave it out."
            )
        if not hit:
            _refuse_target(target, present, name)
        found |= hit
    return tuple(module for module in present if module in found)


def _refuse_target(target: str, present: Sequence[str], name: str) -> None:
    known = sorted({module.rpartition(".")[2] for module in present if module != LM_HEAD_MODULE})
    near = difflib.get_close_matches(target.rpartition(".")[2], known, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise InvalidRequestError(
        f"lora.targets names {target!r:.200}, and the release {name} has no such module. It has "
        f"{', '.join(known)}; {ALL_PROJECTIONS} stands for all of them.{meant}"
    )
