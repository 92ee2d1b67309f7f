"""The streamed refit against least squares over whole models; what it leaves alone; what it refuses."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from builders import save_base, save_tokenizer, tiny_config
from killed import bytes_of, run_killed
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from loram_hub.architecture import FAMILIES
from loram_hub.auto import AutoLoramModel
from loram_hub.errors import CheckpointError, IncompatibleError, InvalidRequestError, VerificationError
from loram_hub.inspection import verify
from loram_hub.pruning import prune
from loram_hub.quantization import quantize
from loram_hub.refitting import RefitSettings, check_refit, refit
from loram_hub.refitting.least_squares import ColumnFit
from loram_hub.release import Release, open_release, write_release

SAMPLES, TOKENS = 11, 19  # more than a batch, and no multiple of one
DIRECT = [family for family in FAMILIES if family not in ("gemma2", "gemma3_text", "olmo2")]
TARGETS = ("output", "residual")
FAMILY_OF_TARGET = [*(("output", family) for family in FAMILIES), *(("residual", family) for family in DIRECT)]
BIASED = {"attention_bias": True, "mlp_bias": True}


def base_model(folder: Path, family: str = "llama", *, dtype: str = "float32", **changes: object) -> Path:
    sliding = {"sliding_window": 8} if family.startswith("gemma") else {}
    return save_tokenizer(save_base(folder, tiny_config(family, layers=5, **sliding, **changes), dtype=dtype))


def pruned(base: Path, out: Path, ratio: float = 0.6) -> Release:
    return prune(base, out, pruning_ratio=ratio, importance="random", keep_first=1, keep_last=1)


def calibration(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 53, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(seed))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


class WholeModels:
    """The reference: base and release whole in memory, in fp64, every activation kept, `torch.linalg.lstsq`."""

    def __init__(self, base: Path, release: Release) -> None:
        self.ids = calibration()
        self.release = release
        self.base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).double().eval()
        self.pruned = AutoLoramModel.from_pretrained(release.folder, dtype=torch.float32).double().eval()

    def activations(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Inputs (`.in`) and outputs (`.out`) of every module at the calibration, (tokens, features)."""
        found: dict[str, torch.Tensor] = {}

        def keep(name: str):  # noqa: ANN202
            def hook(module: torch.nn.Module, args: tuple[object, ...], output: object) -> None:
                for end, value in (("in", args[0] if args else None), ("out", output)):
                    value = value[0] if isinstance(value, tuple) else value
                    if isinstance(value, torch.Tensor):
                        found[f"{name}.{end}"] = value.detach().flatten(0, -2)

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
        with torch.no_grad():
            model(input_ids=self.ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return found

    def solve(self, module: str, x: torch.Tensor, target: torch.Tensor, ridge: float) -> None:
        """Solve one matrix of the release, W: least squares over the tokens and one row per column that pulls at W."""
        matrix = self.pruned.get_submodule(module)
        pull = (ridge * float((x**2).sum(0).mean())) ** 0.5
        rows = torch.cat([x, pull * torch.eye(x.shape[1], dtype=x.dtype)])
        short = target - linear(x, matrix.weight, matrix.bias)
        wanted = torch.cat([short, torch.zeros(x.shape[1], short.shape[1], dtype=x.dtype)])
        matrix.weight.data += torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T

    def refit(self, target: str, ridge: float) -> dict[str, torch.Tensor]:
        self.pruned.requires_grad_(False)
        base = self.activations(self.base)
        for layer in sorted(self.release.plan.kept):
            path = f"model.layers.{layer}"
            attention, mlp = f"{path}.self_attn.o_proj", f"{path}.mlp.down_proj"
            if target == "output":
                for module in (attention, mlp):
                    kept = self.release.plan.kept_on_axes(f"{module}.weight")[1]
                    self.solve(module, base[f"{module}.in"][:, kept], base[f"{module}.out"], ridge)
                continue
            before = self.activations(self.pruned)
            goal = base[f"{path}.in"] + base[f"{attention}.out"]
            self.solve(attention, before[f"{attention}.in"], goal - before[f"{path}.in"], ridge)
            after = self.activations(self.pruned)
            stream = after[f"{path}.in"] + after[f"{attention}.out"]
            self.solve(mlp, after[f"{mlp}.in"], base[f"{path}.out"] - stream, ridge)
        return self.pruned.state_dict()


def assert_equal_to_whole_models(base: Path, tmp_path: Path, target: str, ridge: float = 0.05) -> None:
    release = pruned(base, tmp_path / "pruned")

    refit(
        release.folder,
        tmp_path / "refit",
        base=base,
        calibration=calibration(),
        settings=RefitSettings(target=target, ridge=ridge),
    )

    expected = WholeModels(base, release).refit(target, ridge)
    before, found = weights(release.folder), weights(tmp_path / "refit")
    assert set(found) == set(before)
    solved = [f"{layer}.{m}" for layer in (1, 2, 3) for m in ("self_attn.o_proj", "mlp.down_proj")]
    for name, tensor in found.items():
        if any(name == f"model.layers.{each}.weight" for each in solved):
            assert not torch.allclose(tensor, before[name], atol=1e-3), name
            # lstsq in fp64 on fp64 activations against fp32 activations
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("target", "family"), FAMILY_OF_TARGET)
def test_the_streamed_refit_equals_least_squares_over_whole_models(tmp_path: Path, target: str, family: str) -> None:
    assert_equal_to_whole_models(base_model(tmp_path / "base", family), tmp_path, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("changes", [BIASED, {"tie_word_embeddings": True}], ids=["biases", "tied"])
def test_biases_count_and_tied_embeddings_are_found(tmp_path: Path, target: str, changes: dict[str, bool]) -> None:
    assert_equal_to_whole_models(base_model(tmp_path / "base", "llama", **changes), tmp_path, target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_small_ridge_is_solved_as_exactly(tmp_path: Path, target: str) -> None:
    assert_equal_to_whole_models(base_model(tmp_path / "base"), tmp_path, target, ridge=1e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Release]:
    """A base and a release of it."""
    folder = tmp_path_factory.mktemp("made")
    base = base_model(folder / "base")
    return base, pruned(base, folder / "pruned")


@pytest.mark.parametrize("ridge", [1e-6, 0.05, 3.0])
def test_no_matrix_gives_a_worse_output_on_the_calibration_than_the_kept_weights(
    tmp_path: Path, made: tuple[Path, Release], ridge: float
) -> None:
    base, release = made
    settings = RefitSettings(target="output", ridge=ridge)

    refit(release.folder, tmp_path / "refit", base=base, calibration=calibration(), settings=settings)

    reference = WholeModels(base, release)
    seen = reference.activations(reference.base)
    before, after = weights(release.folder), weights(tmp_path / "refit")
    for layer in sorted(release.plan.kept):
        for module in (f"model.layers.{layer}.self_attn.o_proj", f"model.layers.{layer}.mlp.down_proj"):
            name = f"{module}.weight"
            kept = seen[f"{module}.in"][:, release.plan.kept_on_axes(name)[1]]
            errors = [(linear(kept, w[name].double()) - seen[f"{module}.out"]).norm() for w in (before, after)]
            assert errors[1] < errors[0], name


def test_the_residual_stream_lands_nearer_to_the_bases(tmp_path: Path, made: tuple[Path, Release]) -> None:
    base, release = made
    last = f"model.layers.{max(release.plan.kept)}.out"
    unseen = WholeModels(base, release)
    unseen.ids = calibration(seed=1)[:2]
    goal = unseen.activations(unseen.base)[last]

    refit(release.folder, tmp_path / "refit", base=base, calibration=calibration())

    before = (unseen.activations(unseen.pruned)[last] - goal).norm()
    unseen.pruned = AutoLoramModel.from_pretrained(tmp_path / "refit", dtype=torch.float32).double().eval()
    assert (unseen.activations(unseen.pruned)[last] - goal).norm() < 0.8 * before


@pytest.mark.parametrize("target", TARGETS)
def test_a_large_ridge_leaves_the_kept_weights(tmp_path: Path, made: tuple[Path, Release], target: str) -> None:
    base, release = made
    settings = RefitSettings(target=target, ridge=1e9)

    refit(release.folder, tmp_path / "refit", base=base, calibration=calibration(), settings=settings)

    before = weights(release.folder)
    for name, tensor in weights(tmp_path / "refit").items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_where_nothing_was_pruned_nothing_changes(tmp_path: Path, target: str) -> None:
    base = base_model(tmp_path / "base")
    whole = pruned(base, tmp_path / "whole", ratio=0.0)

    refit(
        whole.folder,
        tmp_path / "refit",
        base=base,
        calibration=calibration(),
        settings=RefitSettings(target=target),
    )

    before = weights(whole.folder)
    assert before
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "refit").items())
    verify(tmp_path / "refit")


def test_a_matrix_that_lost_no_column_is_solved_for_the_residual_stream_alone(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    release = pruned(base, tmp_path / "pruned", ratio=0.3)  # all three KV heads stay
    name = "model.layers.1.self_attn.o_proj.weight"

    for target in TARGETS:
        refit(
            release.folder,
            tmp_path / target,
            base=base,
            calibration=calibration(),
            settings=RefitSettings(target=target),
        )

    before = weights(release.folder)
    assert release.plan.layers[1].kv_heads == 3
    assert torch.equal(weights(tmp_path / "output")[name], before[name])
    assert not torch.equal(weights(tmp_path / "residual")[name.replace("1", "2")], before[name.replace("1", "2")])


def test_weights_keep_the_type_they_are_stored_in(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", dtype="bfloat16")
    release = pruned(base, tmp_path / "pruned")

    refit(release.folder, tmp_path / "refit", base=base, calibration=calibration())

    before, after = weights(release.folder), weights(tmp_path / "refit")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert not torch.equal(after["model.layers.2.mlp.down_proj.weight"], before["model.layers.2.mlp.down_proj.weight"])


def test_equal_input_gives_equal_bytes(tmp_path: Path, made: tuple[Path, Release]) -> None:
    base, release = made

    for name in ("one", "two"):
        refit(release.folder, tmp_path / name, base=base, calibration=calibration())

    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_the_manifest_says_what_was_done_and_nothing_claims_the_bases_weights(
    tmp_path: Path, made: tuple[Path, Release]
) -> None:
    base, release = made
    settings = RefitSettings(target="output", ridge=0.1, samples=6, tokens=12, seed=3)
    texts = [" ".join(f"w{4 + (number * step) % 49}" for step in range(1, 12)) for number in range(40)]

    done = refit(release.folder, tmp_path / "refit", base=base, calibration=texts, settings=settings)

    record = dict(done.manifest.alignment["refit"])
    assert len(record.pop("calibration_sha256")) == 64
    assert record == {"target": "output", "ridge": 0.1, "samples": 6, "tokens": 12}
    assert done.manifest.recipe == {**release.manifest.recipe, "refit": asdict(settings)}
    assert verify(tmp_path / "refit", base=base).release is not None
    with pytest.raises(InvalidRequestError, match="was refitted"):
        verify(tmp_path / "refit", base=base, full=True)


def test_a_refitted_release_can_be_refitted_again_and_quantized(tmp_path: Path, made: tuple[Path, Release]) -> None:
    base, release = made
    refit(release.folder, tmp_path / "one", base=base, calibration=calibration())

    again = refit(tmp_path / "one", tmp_path / "two", base=base, calibration=calibration(1))
    quantized = quantize(tmp_path / "two", tmp_path / "nf4")

    first = open_release(tmp_path / "one").manifest.alignment
    assert set(first) == {"refit"}
    assert set(again.manifest.alignment) == {"refit", "earlier"}
    assert again.manifest.alignment["earlier"] == first
    assert again.manifest.alignment["refit"] != first["refit"]
    assert quantized.manifest.alignment == again.manifest.alignment
    with pytest.raises(InvalidRequestError, match="is NF4"):
        refit(tmp_path / "nf4", tmp_path / "three", base=base, calibration=calibration())


def aligned(release: Release, out: Path) -> Release:
    """A release whose manifest says that it was trained, with other weights."""
    trained = {"steps": 3, "losses": [[0, 5.0], [3, 4.0]], "corpora": ["mine.jsonl"]}
    manifest = replace(release.manifest, alignment=trained, files={})
    with write_release(out, manifest=manifest, plan=release.plan, config=release.config) as folder:
        tensors = {name: 1.25 * tensor for name, tensor in weights(release.folder).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_release(out)


def test_a_refit_after_an_alignment_keeps_that_as_what_came_earlier(tmp_path: Path, made: tuple[Path, Release]) -> None:
    base, release = made
    trained = aligned(release, tmp_path / "aligned")

    done = refit(trained.folder, tmp_path / "refit", base=base, calibration=calibration())

    assert set(done.manifest.alignment) == {"refit", "earlier"}
    assert done.manifest.alignment["earlier"] == trained.manifest.alignment


def test_the_base_of_a_refitted_release_is_told_by_what_the_refit_left(
    tmp_path: Path, made: tuple[Path, Release]
) -> None:
    base, release = made
    refit(release.folder, tmp_path / "one", base=base, calibration=calibration())
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    changed = weights(tuned)
    changed["model.layers.1.self_attn.q_proj.weight"] += 0.01
    save_file(changed, tuned / "model.safetensors", metadata={"format": "pt"})

    for folder in (release.folder, tmp_path / "one"):
        with pytest.raises(IncompatibleError, match=r"q_proj.*pruned from another model"):
            refit(folder, tmp_path / "two", base=tuned, calibration=calibration())


def test_calibration_is_not_written_over(tmp_path: Path, made: tuple[Path, Release]) -> None:
    base, release = made
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [" ".join(f"w{4 + (number * step) % 49}" for step in range(1, 200)) for number in range(80)]
    (texts / "a.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines), encoding="utf-8")

    for out in (texts, tmp_path):
        with pytest.raises(InvalidRequestError, match="overlap"):
            refit(release.folder, out, base=base, calibration=texts, overwrite=True)
    assert (texts / "a.jsonl").is_file()


def test_columns_that_the_inputs_do_not_determine_are_refused_without_a_ridge() -> None:
    """Rounding leaves some singular equations positive definite: their solution would be arbitrary, and huge."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        fit = ColumnFit("a matrix", torch.zeros(3, 20))
        fit.add(torch.randn(19, 20, generator=generator), torch.randn(19, 3, generator=generator))

        with pytest.raises(InvalidRequestError, match=r"20 columns of a matrix.*set a larger ridge"):
            fit.solve(0.0, torch.float32)


def test_check_refit_counts_and_writes_nothing(tmp_path: Path, made: tuple[Path, Release]) -> None:
    base, release = made

    found = check_refit(release.folder, tmp_path / "refit", base=base, calibration=calibration())

    shapes = [
        weights(release.folder)[f"model.layers.{layer}.{module}.weight"].shape
        for layer in (1, 2, 3)
        for module in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert (found.layers, found.tokens) == (3, SAMPLES * TOKENS)
    assert found.parameters == sum(shape.numel() for shape in shapes)
    assert found.most_columns == max(shape[1] for shape in shapes)
    assert found.solver_bytes == max(8 * (2 * c * c + 2 * r * c) for r, c in shapes)
    assert found.nbytes == sum(tensor.nbytes for tensor in weights(release.folder).values())
    assert not (tmp_path / "refit").exists()


def test_fewer_tokens_than_columns_is_solved_with_a_warning(
    tmp_path: Path, made: tuple[Path, Release], caplog: pytest.LogCaptureFixture
) -> None:
    base, release = made

    with caplog.at_level(logging.WARNING, logger="loram_hub"):
        refit(release.folder, tmp_path / "refit", base=base, calibration=calibration()[:2, :4])

    assert "8 tokens for matrices of up to" in caplog.text
    verify(tmp_path / "refit")


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_where_a_norm_follows_the_message_names_the_other_target(tmp_path: Path, family: str) -> None:
    base = base_model(tmp_path / "base", family)
    release = pruned(base, tmp_path / "pruned")

    with pytest.raises(InvalidRequestError, match="target 'output'"):
        check_refit(release.folder, tmp_path / "refit", base=base, calibration=calibration())


def test_another_base_is_refused(tmp_path: Path, made: tuple[Path, Release]) -> None:
    base, release = made
    wider = base_model(tmp_path / "wider", rms_norm_eps=1e-5)
    tuned = save_base(tmp_path / "tuned", tiny_config(layers=5), seed=1)
    (tuned / "config.json").write_bytes((base / "config.json").read_bytes())

    with pytest.raises(IncompatibleError, match="SHA-256"):
        refit(release.folder, tmp_path / "refit", base=wider, calibration=calibration())
    with pytest.raises(IncompatibleError, match="pruned from another model"):
        refit(release.folder, tmp_path / "refit", base=tuned, calibration=calibration())
    with pytest.raises(InvalidRequestError, match="--base"):
        refit(release.folder, tmp_path / "refit", calibration=calibration())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "Calibration is needed"),
        (torch.zeros(2, 8), "whole numbers"),
        (torch.full((2, 8), 53), "vocabulary has 53"),
        (torch.zeros(8, dtype=torch.long), "samples, tokens"),
        (["w4 w5"], "64 samples x 128 tokens need"),
    ],
)
def test_unusable_calibration_is_refused(
    tmp_path: Path, made: tuple[Path, Release], given: object, message: str
) -> None:
    base, release = made

    with pytest.raises(InvalidRequestError, match=message):
        refit(release.folder, tmp_path / "refit", base=base, calibration=given)


def test_a_calibration_that_decides_nothing_needs_a_ridge(tmp_path: Path, made: tuple[Path, Release]) -> None:
    base, release = made

    with pytest.raises(InvalidRequestError, match=r"larger ridge; 0\.05 is the default"):
        refit(
            release.folder,
            tmp_path / "refit",
            base=base,
            calibration=torch.full((2, 4), 7),
            settings=RefitSettings(ridge=0),
        )
    assert not (tmp_path / "refit").exists()


def test_activations_that_are_no_numbers_stop_the_refit(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    damaged = weights(base)
    damaged["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    release = pruned(base, tmp_path / "pruned")
    save_file(damaged, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(VerificationError, match="not finite"):
        refit(release.folder, tmp_path / "refit", base=base, calibration=calibration())


def test_a_release_without_tokenizer_wants_token_ids(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_config(layers=5))
    release = pruned(base, tmp_path / "pruned")

    with pytest.raises(CheckpointError, match="no tokenizer"):
        refit(release.folder, tmp_path / "refit", base=base, calibration=["w4 w5"])


def test_nothing_is_written_over(tmp_path: Path, made: tuple[Path, Release]) -> None:
    base, release = made
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()

    with pytest.raises(InvalidRequestError, match="already exists"):
        refit(release.folder, tmp_path / "out", base=base, calibration=calibration())
    for folder in (release.folder, base):
        with pytest.raises(InvalidRequestError, match="overlap"):
            refit(release.folder, folder, base=base, calibration=calibration(), overwrite=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": "logits"},
        {"ridge": -0.1},
        {"ridge": float("nan")},
        {"ridge": float("inf")},
        {"ridge": True},
        {"samples": 0},
        {"tokens": 1},
        {"seed": -1},
        {"samples": 1.5},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        RefitSettings(**wrong)


@pytest.mark.slow
def test_a_killed_refit_leaves_the_old_release_or_the_new(tmp_path: Path, made: tuple[Path, Release]) -> None:
    base, release = made
    refit(release.folder, tmp_path / "old", base=base, calibration=calibration(1))
    shutil.copytree(tmp_path / "old", tmp_path / "out")

    killed = run_killed(
        "import torch, transformers.models.llama.modeling_llama; from loram_hub.refitting import refit",
        "refit(release, out, base=base, calibration=torch.tensor(ids), overwrite=True)",
        "assert bytes_of(Path(out)) in (bytes_of(Path(old)), bytes_of(Path(f'{out}-timed')))",
        kills=6,
        release=str(release.folder),
        base=str(base),
        ids=calibration().tolist(),
        out=str(tmp_path / "out"),
        old=str(tmp_path / "old"),
    )

    assert killed >= 2
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "out-timed") != bytes_of(tmp_path / "old")
