"""A study: what is varied, what is held fixed, and what is measured, in one frozen record; its YAML has these keys.

A study file may hold `profiles`: named sets of keys that outweigh those above them, such as a `quick` one for tests.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal

from loram_hub.alignment.settings import AlignmentSettings
from loram_hub.corpora import Corpus
from loram_hub.errors import InvalidRequestError
from loram_hub.finetuning.recipe import LoraSection, TrainingSection
from loram_hub.instructions import DataSource
from loram_hub.plan import PruningSettings
from loram_hub.recipes import FLAT, PATH, read_profile
from loram_hub.sparsification.settings import SparsitySettings
from loram_hub.studies.labels import slug
from loram_hub.studies.records import is_name, is_study_name
from loram_hub.studies.tables import PARTS

MethodName = Literal["rand", "stru", "semi", "unst"]
Quantization = Literal["none", "nf4"]

TAYLOR = "taylor"
STUDY_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way of pruning, at several ratios."""

    method: MethodName
    """`rand` and `stru` remove channel groups, at random or by Taylor importance; `semi` and `unst` remove single
    weights by SparseGPT, n of every m or a share of all."""
    ratios: tuple[float, ...] = ()
    """Pruning ratios of `rand` and `stru`, sparsities of `unst`; `semi` has none."""
    importance: str = TAYLOR
    """How `stru` scores channel groups."""
    pattern: str = "4:8"
    """Of `semi`: n of every m weights are kept."""
    masked: tuple[bool, ...] = (False,)
    """Whether the LoRA update is masked; `semi` and `unst` alone."""

    def __post_init__(self) -> None:
        """Check ratios, importance, pattern and masks; raises `InvalidRequestError`."""
        if (self.method == "semi") != (not self.ratios):
            wanted = "no ratios: its pattern says how much goes" if self.method == "semi" else "at least one ratio"
            raise InvalidRequestError(f"{self.method} needs {wanted}; found {list(self.ratios)}.")
        _refuse_repeated(f"masked of {self.method}", self.masked)
        _refuse_repeated(f"ratios of {self.method}", [f"{ratio:g}" for ratio in self.ratios], needed=False)
        if self.method == "semi":
            SparsitySettings(pattern=self.pattern)
        if self.method == "stru":
            _importance(self.importance)
        if self.method in ("rand", "stru") and any(self.masked):
            raise InvalidRequestError(f"masked is true, and {self.method} leaves nothing to mask. Leave it out.")
        for ratio in self.ratios:
            if self.method == "unst":
                SparsitySettings(sparsity=ratio)
            else:
                PruningSettings(pruning_ratio=ratio)

    @property
    def is_sparse(self) -> bool:
        """Whether single weights are removed."""
        return self.method in ("semi", "unst")

    @property
    def scoring(self) -> str:
        """How channel groups are scored; empty where single weights are removed."""
        return "" if self.is_sparse else "random" if self.method == "rand" else self.importance

    @property
    def kept(self) -> str:
        """The pattern of `semi`; empty of the others."""
        return self.pattern if self.method == "semi" else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Texts by which Taylor importance and SparseGPT choose."""

    source: str = field(metadata={PATH: ""})
    """File, folder, dataset id, or `demo:texts`."""
    samples: int = 32
    """Rows for Taylor importance."""
    tokens: int = 128
    """Tokens of such a row."""
    sparse_samples: int = 128
    """Rows for SparseGPT."""
    sparse_tokens: int = 2048
    """Tokens of such a row."""

    def __post_init__(self) -> None:
        """Check that there are rows of tokens; raises `InvalidRequestError`."""
        _refuse_below(self, 1, "samples", "sparse_samples")
        _refuse_below(self, 2, "tokens", "sparse_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """Continual pre-training between pruning and fine-tuning."""

    steps: tuple[int, ...] = (0,)
    """Numbers of optimizer steps that are compared; 0 is no alignment."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    corpora: tuple[Corpus, ...] = field(default=(), metadata={PATH: "source"})
    """Texts to train on; `demo:texts` is a source, too."""
    settings: AlignmentSettings = field(
        default_factory=AlignmentSettings,
        metadata={FLAT: ("seed", "steps", "warmup_steps", "evaluate_every", "save_every", "keep_checkpoints")},
    )
    """How they are trained."""

    def __post_init__(self) -> None:
        """Check that steps have texts; raises `InvalidRequestError`."""
        _refuse_repeated("alignment.steps", self.steps)
        if min(self.steps) < 0:
            raise InvalidRequestError(f"alignment.steps is {list(self.steps)}; numbers from 0 are needed.")
        if not 0 <= self.warmup < 1:
            raise InvalidRequestError(f"alignment.warmup is {self.warmup:g}; a share from 0 to below 1 is needed.")
        if any(self.steps) and not self.corpora:
            raise InvalidRequestError("alignment.corpora is missing: aligned cells need texts to train on.")
        if self.settings.distillation:
            raise InvalidRequestError("alignment.distillation needs a teacher, which cells of a study do not have.")

    def settings_of(self, steps: int, seed: int) -> AlignmentSettings:
        """Return the settings of a cell; one evaluation before training and one after it."""
        return replace(
            self.settings, steps=steps, seed=seed, warmup_steps=int(steps * self.warmup), evaluate_every=steps,
            save_every=steps, keep_checkpoints=1,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """What is fine-tuned on."""

    name: str
    """How tables call it."""
    train: tuple[DataSource, ...] = field(metadata={PATH: "source"})
    """Sources; `demo:tasks` and `demo:arithmetic` are some, too."""

    def __post_init__(self) -> None:
        """Check name and sources; raises `InvalidRequestError`."""
        _check_name("data", self.name)
        if not self.train:
            raise InvalidRequestError(f"data {self.name!r} has no source to train on. Name at least one.")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutSet:
    """What every model is measured on."""

    name: str
    """How tables call it."""
    source: str = field(metadata={PATH: ""})
    """File, dataset id, `demo:held-out tasks`, `demo:held-out texts` or `demo:held-out arithmetic`."""
    of: str | None = None
    """Name of the training data that it is in domain for; left out, it is out of domain for all."""
    limit: int | None = None
    """Records that are read at most."""
    max_tokens: int = 512
    """Longest sequence in tokens."""

    def __post_init__(self) -> None:
        """Check name and numbers; raises `InvalidRequestError`."""
        _check_name("held_out", self.name)
        _refuse_below(self, 1, "limit")
        _refuse_below(self, 2, "max_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A grid of cells: methods x ratios x alignment x quantization x data x seeds, and three controls.

    With and without recovery are no axis: each cell measures the pruned model with the adapter and the base with the
    recovered one. The controls are the base untouched, plain LoRA on the base, and plain LoRA on only those layers of
    the base that structured pruning leaves whole.
    """

    name: str
    """Name of its folder under `docs/results`, letters, digits and dashes."""
    title: str
    """Headline."""
    question: str
    """What it asks, in a sentence or two."""
    mirrors: str
    """Tables or figures of the LoRAM paper that it mirrors."""
    base: str = field(metadata={PATH: ""})
    """The base model: Hub id, folder, or `demo`, SmolLM2-135M-Instruct from its wheel."""
    revision: str | None = None
    """Branch, tag or commit of a base on the Hub."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each cell is run with each: of random pruning, calibration, order of texts and examples, the adapter's start."""
    methods: tuple[Method, ...]
    """Ways of pruning."""
    keep_first: int = 4
    """Layers at the start that structured pruning leaves whole."""
    keep_last: int = 2
    """Layers at the end that it leaves whole."""
    calibration: Calibration | None = None
    """Texts for Taylor importance and SparseGPT."""
    alignment: Alignment = field(default_factory=Alignment)
    """Continual pre-training."""
    quantization: tuple[Quantization, ...] = ("none",)
    """Types that the projections are stored in; with nf4 it is QLoRAM."""
    data: tuple[TrainingData, ...]
    """What is fine-tuned on; a cell each."""
    held_out: tuple[HeldOutSet, ...]
    """What is measured."""
    lora: LoraSection = field(default_factory=LoraSection)
    """The adapter; the same for every cell."""
    training: TrainingSection = field(default_factory=TrainingSection)
    """Fine-tuning; the same for every cell."""
    shows: tuple[str, ...] = ()
    """Parts of its page, by name: losses, recovery, ratios, steps, domains, cost. Left out: all that have data."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where models run."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """What fine-tuning and measurement compute in."""

    def __post_init__(self) -> None:
        """Check what no section can check alone; raises `InvalidRequestError`."""
        if not is_study_name(self.name):
            raise InvalidRequestError(f"name is {self.name!r:.80}; letters, digits and dashes are needed, at most 64.")
        _refuse_below(self, 0, "keep_first", "keep_last")
        _refuse_repeated("seeds", self.seeds)
        _refuse_repeated("quantization", self.quantization)
        _refuse_repeated("data", [one.name for one in self.data])
        _refuse_repeated("held_out", [slug(one.name) for one in self.held_out])  # which files and tables are named by
        _refuse_repeated("methods", [setting for method in self.methods for setting in _settings_of(method)])
        if min(self.seeds) < 0:
            raise InvalidRequestError(f"seeds is {list(self.seeds)}; numbers from 0 are needed.")
        if self.training.steps is None:
            raise InvalidRequestError(
                "training.steps is missing: cells are compared after the same number of steps, and are checkpointed by "
                "it. Give it, and no epochs."
            )
        unknown = [name for name in self.shows if name not in PARTS]
        if unknown:
            raise InvalidRequestError(f"shows has {unknown[0]!r:.80}; parts of a page are {', '.join(PARTS)}.")
        known = {one.name for one in self.data}
        for held_out in self.held_out:
            if held_out.of is not None and held_out.of not in known:
                raise InvalidRequestError(
                    f"held_out {held_out.name!r} is of {held_out.of!r}; data has {', '.join(sorted(known))}."
                )
        if self.lora.masked is not None:
            raise InvalidRequestError("lora.masked is an axis of a study: give it as `masked` of a method.")
        if self.calibration is None and any(
            method.is_sparse or (method.method == "stru" and method.importance.startswith(TAYLOR))
            for method in self.methods
        ):
            raise InvalidRequestError("calibration is missing: Taylor importance and SparseGPT need texts.")


def _settings_of(method: Method) -> list[str]:
    """Return what tells the cells of a method from those of others."""
    scoring = _importance(method.scoring) if method.method == "stru" else ""
    name = " ".join(part for part in (method.method, scoring, method.kept) if part)
    return [
        f"{name}{'' if ratio is None else f' {ratio:g}'}{' masked' if masked else ''}"
        for ratio in method.ratios or (None,)
        for masked in method.masked
    ]


def _importance(text: str) -> str:
    """Return an importance in the one way to write it; raises `InvalidRequestError`."""
    if text == TAYLOR:
        return text
    from loram_hub.importance import parse_importance  # which needs torch: pages of most studies are made without

    found = parse_importance(text)
    if found.method == "random":
        raise InvalidRequestError("importance is random; write method: rand.")
    return TAYLOR if found == parse_importance(TAYLOR) else str(found)


def _check_name(key: str, name: str) -> None:
    if not is_name(name):
        raise InvalidRequestError(f"The name {name!r:.80} in {key} is none; one line of visible characters is needed.")


def _refuse_repeated(key: str, values: Sequence[object], *, needed: bool = True) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise InvalidRequestError(f"{key} has {twice[0]!r:.200} twice; its cells could not be told apart.")
    if needed and not values:
        raise InvalidRequestError(f"{key} is empty. Give at least one, or leave the key out if it has a default.")


def _refuse_below(section: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < least:
            raise InvalidRequestError(f"{name} is {value}; a number from {least} is needed.")


def read_study(study: str | os.PathLike[str], *, profile: str | None = None) -> Study:
    """Read a study from its file, or one of the ready-made ones by its name.

    Args:
        study: a YAML file, or a name from `ready_studies`.
        profile: name of a set of keys in the file's `profiles`; None for none.

    Raises:
        InvalidRequestError: there is no such study or profile, or it says what no study can.
        MissingDependencyError: PyYAML is not installed.
    """
    path = Path(study).expanduser()
    if path.suffix not in STUDY_SUFFIXES and str(study) in ready_studies():
        path = Path(str(files("loram_hub.studies") / "ready" / f"{study}.yaml"))
    elif path.suffix not in STUDY_SUFFIXES and not path.exists():
        raise InvalidRequestError(
            f"There is no study {str(study)!r:.200}. Give a YAML file, or one of: {', '.join(ready_studies())}."
        )
    return read_profile(Study, path, profile)


def ready_studies() -> Mapping[str, str]:
    """Return the ready-made studies: what each file's first line says of it, by name."""
    found: dict[str, str] = {}
    for entry in sorted((files("loram_hub.studies") / "ready").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").partition("\n")[0]
            found[entry.name.removesuffix(".yaml")] = first.lstrip("# ")
    return found
