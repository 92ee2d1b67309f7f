"""`loram estimate`: what a training takes of a GPU, against real models, real files and a Hub that counts bytes."""

from __future__ import annotations

import json
import shlex
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from base_configs import BASES
from builders import save_base, save_tokenizer, tiny_config
from click.testing import CliRunner
from hub_client import python
from hub_server import HubServer

from loram_hub.cli import main
from loram_hub.errors import (
    CheckpointError,
    InvalidRequestError,
    LoramError,
    PlanMismatchError,
    ResourceError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.estimation import MemoryOptions, Reserves, TrainingShape, gpu_memory
from loram_hub.files import dump_json
from loram_hub.fitting import alternative_text, estimate_memory, fit_text, save_picture
from loram_hub.plan import nf4_bytes
from loram_hub.pruning import prune
from loram_hub.release import open_metadata, seal_release

LLAMA_70B = BASES["meta-llama/Llama-3.1-70B"][0]
STRUCTURE: dict[str, Any] = {"pruning_ratio": 0.5, "keep_first": 1, "keep_last": 1}
ESTIMATE = """
from dataclasses import asdict
from loram_hub import estimate_memory
fit = estimate_memory(sys.argv[1])
print(json.dumps({"fit": fit.to_dict(), "torch": "torch" in sys.modules}))
"""
ERROR = """
from loram_hub import estimate_memory
from loram_hub.errors import LoramError
try:
    estimate_memory(sys.argv[1])
    print(json.dumps(None))
except LoramError as err:
    print(json.dumps([type(err).__name__, str(err)]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(dump_json(LLAMA_70B), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of 4 MB, and releases of it in NF4 and in 16 bit."""
    folder = tmp_path_factory.mktemp("releases")
    sizes = {"hidden_size": 96, "intermediate_size": 300, "vocab_size": 9_000, "head_dim": 16}
    base = save_tokenizer(save_base(folder / "base", tiny_config(layers=4, **sizes), dtype="bfloat16"))
    for name, quantized in (("nf4", True), ("bf16", False)):
        prune(base, folder / name, importance="random", quantize=quantized, **STRUCTURE)
    return {name: folder / name for name in ("base", "nf4", "bf16")}


def command(*arguments: str | Path) -> tuple[int, Any]:
    done = CliRunner().invoke(main, ["estimate", *map(str, arguments), "--json"])
    return done.exit_code, json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_what_stands_is_what_the_opened_model_holds(releases: dict[str, Path], kind: str) -> None:
    """The reference: every tensor of the model, in the blocks of 512 bytes that CUDA's allocator gives out."""
    import torch

    from loram_hub.auto import AutoLoramModel

    model = AutoLoramModel.from_pretrained(releases[kind], dtype=torch.bfloat16)
    held = []
    for parameter in model.parameters():
        held.append(parameter.nbytes)
        if (state := getattr(parameter, "quant_state", None)) is not None:
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            held += [part.nbytes for part in parts]
    expected = sum(-(-nbytes // 512) * 512 for nbytes in held)

    found = estimate_memory(releases[kind]).breakdown

    assert found.projections + found.scales + found.embedding + found.lm_head + found.rest == expected
    assert (found.scales > 0) == (kind == "nf4")


def test_what_is_stored_is_counted_from_the_headers(releases: dict[str, Path]) -> None:
    fits = {kind: estimate_memory(releases[kind]) for kind in ("nf4", "bf16")}

    plan = open_metadata(releases["nf4"]).plan
    shapes = plan.tensor_shapes()
    elements = {name: shape[0] * (shape[1] if len(shape) == 2 else 1) for name, shape in shapes.items()}
    matrices = {name for name in shapes if name.startswith("model.layers") and "_proj" in name}
    rest = 2 * sum(count for name, count in elements.items() if name not in matrices)
    tables = 4 * 16 + 4 * 256  # code tables of each matrix
    assert fits["bf16"].subject.stored_bytes == 2 * sum(elements.values())
    assert fits["nf4"].subject.stored_bytes == rest + sum(nf4_bytes(elements[name]) + tables for name in matrices)


def test_a_planned_release_is_estimated_as_the_release_that_is_made(releases: dict[str, Path]) -> None:
    made = estimate_memory(releases["nf4"])
    planned = estimate_memory(releases["base"], **STRUCTURE)

    assert planned.breakdown == made.breakdown
    assert (made.subject.kind, planned.subject.kind) == ("release", "planned release")
    sixteen = estimate_memory(releases["base"], quantized=False, **STRUCTURE)
    assert sixteen.breakdown == estimate_memory(releases["bf16"]).breakdown
    assert estimate_memory(releases["base"]).breakdown.projections > planned.breakdown.projections


def test_of_a_release_on_the_hub_less_than_a_megabyte_is_read(releases: dict[str, Path], tmp_path: Path) -> None:
    weights = (releases["nf4"] / "model.safetensors").stat().st_size
    with HubServer(tmp_path / "hub") as hub:
        commit = hub.add_repo("alice/nf4", releases["nf4"])
        found = python(hub, tmp_path / "home", ESTIMATE, "alice/nf4")
        sent = sum(request.sent for request in hub.requests)
        fetched = [path.name for path in (tmp_path / "home").rglob("*.safetensors")]

    assert weights > 2_000_000
    assert 0 < sent < 1_000_000
    assert set(fetched) == {"mask_index.safetensors"}
    local = estimate_memory(releases["nf4"]).to_dict()
    assert found["fit"] == json.loads(json.dumps(local | {"id": "alice/nf4", "commit": commit}))
    assert found["torch"] is False


def rewrite_weights(source: Path, folder: Path, *, seal: bool, **changes: Any) -> Path:
    """Copy a release with other weights: `dropped` is left out, `renamed` gets another name, `swapped` other bytes."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    if "dropped" in changes:
        del tensors[changes["dropped"]]
    if "renamed" in changes:
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop(changes["renamed"])
    if "shortened" in changes:
        tensors[changes["shortened"]] = tensors[changes["shortened"]][:-1].clone()
    if "swapped" in changes:
        tensors[changes["swapped"]] = tensors[changes["swapped"]] ^ 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if seal:
        opened = open_metadata(folder)
        seal_release(folder, manifest=replace(opened.manifest, files={}), plan=opened.plan)
    return folder


ALTERED: dict[str, tuple[dict[str, Any], bool, type[LoramError], str]] = {
    "other bytes": ({"swapped": "model.layers.1.mlp.up_proj.weight"}, False, VerificationError, "not the file of its"),
    "a scale too few": ({"shortened": "model.layers.1.mlp.up_proj.weight.absmax"}, True, PlanMismatchError, "absmax"),
    "a row too few": ({"shortened": "lm_head.weight"}, True, PlanMismatchError, "lm_head.weight"),
    "no norm": ({"dropped": "model.norm.weight"}, True, PlanMismatchError, "model.norm.weight"),
    "no codes": ({"dropped": "model.layers.1.mlp.up_proj.weight"}, True, PlanMismatchError, "up_proj"),
    "one more": ({"renamed": "model.norm.weight"}, True, PlanMismatchError, "layers.9"),
}


def test_an_altered_release_on_the_hub_is_an_error(releases: dict[str, Path], tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        for number, (changes, seal, _, _) in enumerate(ALTERED.values()):
            made = rewrite_weights(releases["nf4"], tmp_path / str(number), seal=seal, **changes)
            hub.add_repo(f"alice/altered{number}", made)
        code = ERROR.replace("estimate_memory(sys.argv[1])", "estimate_memory(name)")
        body = "\n".join(f"    {line}" for line in code.replace("print(json.dumps(", "found.append((").splitlines())
        names = [f"alice/altered{number}" for number in range(len(ALTERED))]
        found = python(
            hub, tmp_path / "home", f"found = []\nfor name in sys.argv[1:]:\n{body}\nprint(json.dumps(found))", *names
        )

    for (_, _, kind, words), (raised, message) in zip(ALTERED.values(), found, strict=True):
        assert raised == kind.__name__, message
        assert words in message


def test_an_altered_release_in_a_folder_is_an_error(releases: dict[str, Path], tmp_path: Path) -> None:
    for number, (changes, seal, _, _) in enumerate(ALTERED.values()):
        if not seal:
            continue  # an equal size and another hash: found when it is opened, which reads every byte
        made = rewrite_weights(releases["nf4"], tmp_path / str(number), seal=seal, **changes)
        with pytest.raises((PlanMismatchError, CheckpointError)):
            estimate_memory(made)


def test_the_components_add_up_and_the_rest_of_the_gpu_is_free(config: Path) -> None:
    fit = estimate_memory(config, gpu="24GB", pruning_ratio=0.85)

    values = fit.to_dict()["breakdown"]
    assert sum(value for key, value in values.items() if key not in ("total", "moment")) == values["total"]
    assert fit.free_bytes == 24 * 2**30 - values["total"]
    assert fit.fits
    assert fit.breakdown.context == Reserves().context_bytes


@pytest.mark.parametrize(
    "arguments",
    [
        ("--micro-batch", "4", "--gpu", "16GB", "--pruning-ratio", "0.85"),
        ("--no-checkpointing", "--optim", "adamw_torch", "--gpu", "8GB", "--rank", "64", "--pruning-ratio", "0.85"),
        ("--embedding", "cpu", "--lm-head", "int8", "--seq", "4096", "--gpu", "t4", "--pruning-ratio", "0.9"),
    ],
)
def test_each_advice_saves_what_it_says_when_it_is_followed(config: Path, arguments: tuple[str, ...]) -> None:
    code, before = command(config, *arguments)

    assert code == ResourceError.exit_code
    advice = [each for each in before["advice"] if each["option"]]
    assert len(advice) >= 4
    assert [each["saved_bytes"] for each in before["advice"]] == sorted(
        (each["saved_bytes"] for each in before["advice"]), reverse=True
    )
    for each in advice:
        code, after = command(config, *arguments, *shlex.split(each["option"]))
        assert before["breakdown"]["total"] - after["breakdown"]["total"] == each["saved_bytes"] > 0
        assert each["fits"] == after["fits"] == (code == 0)


def test_the_exit_code_says_whether_it_fits(config: Path) -> None:
    fits, small = (command(config, "--pruning-ratio", "0.85", "--gpu", gpu) for gpu in ("24GB", "8GB"))

    assert (fits[0], fits[1]["fits"], fits[1]["free_bytes"] > 0) == (0, True, True)
    assert (small[0], small[1]["fits"], small[1]["free_bytes"] < 0) == (6, False, True)


def test_the_largest_settings_fit_and_one_more_does_not(config: Path) -> None:
    names = {"sequence_length": "--seq", "micro_batch": "--micro-batch", "rank": "--rank"}
    _, found = command(config, "--pruning-ratio", "0.85")

    for name, option in names.items():
        most = found["largest"][name]
        codes = [command(config, "--pruning-ratio", "0.85", option, str(value))[0] for value in (most, most + 1)]
        assert codes == [0, 6], name
    ratio = found["smallest_ratio"]
    codes = [command(config, "--pruning-ratio", f"{value:.3f}")[0] for value in (ratio, ratio - 0.001)]
    assert codes == [0, 6]


def test_a_base_without_a_ratio_is_estimated_unpruned_and_told_the_ratio_that_fits(config: Path) -> None:
    code, found = command(config, "--gpu", "20GB")

    assert code == 6
    assert found["kind"] == "base model"
    assert found["breakdown"]["projections"] > 30 * 2**30  # 68.5 billion weights at half a byte
    assert 0.6 < found["smallest_ratio"] < 0.7
    assert found["largest"] == {"sequence_length": None, "micro_batch": None, "rank": None}


def test_people_are_told_the_verdict_the_parts_and_what_to_lower(config: Path) -> None:
    done = CliRunner().invoke(main, ["estimate", str(config), "--pruning-ratio", "0.85", "--gpu", "10GB"])

    assert done.exit_code == 6
    assert "Does not fit 10GB (10.00 GiB)" in done.stdout
    for words in (
        "projections",
        "lm_head",
        "fragmentation",
        "highest moment",
        "embedding in main memory",
        "assumptions",
    ):
        assert words in done.stdout
    assert "rank, all else as above: not even 1 fits" in done.stdout
    fit = estimate_memory(config, pruning_ratio=0.85)
    fitting = fit_text(fit)
    assert "Fits 20GB" in fitting
    assert f"every rank up to {fit.largest.rank} fits" in fitting
    assert f"every one from {fit.smallest_ratio:.3f} on fits" in fitting
    assert "What would lower it" not in fitting


def test_the_picture_is_a_png_and_is_told_in_words(config: Path, tmp_path: Path) -> None:
    picture = tmp_path / "fit.png"
    code, found = command(config, "--pruning-ratio", "0.85", "--gpu", "rtx4090", "--picture", picture)
    data = picture.read_bytes()
    again = save_picture(estimate_memory(config, pruning_ratio=0.85, gpu="rtx4090"), tmp_path / "again.png")

    assert code == 0
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800 < 3 * height
    assert (tmp_path / "again.png").read_bytes() == data
    assert found["picture"] == {"file": str(picture), "alternative_text": again}
    total = found["breakdown"]["total"] / 2**30
    assert f"{total:.2f} GiB in all, against 23.51 GiB of rtx4090" in again
    small = estimate_memory(config, pruning_ratio=0.85, gpu="8GB")
    assert "too much" in alternative_text(small)


def test_a_picture_that_cannot_be_written_is_said_so(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fit = estimate_memory(config, pruning_ratio=0.85)

    with pytest.raises(ResourceError, match=r"fit\.png"):
        save_picture(fit, tmp_path / "file" / "fit.png")


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("20GB", 20 * 1024),
        ("20 GiB", 20 * 1024),
        ("16384MiB", 16_384),
        ("1.5g", 1536),
    ],
)
def test_a_gpu_of_a_size_has_that_size(text: str, mib: int) -> None:
    assert gpu_memory(text).nbytes == mib * 2**20


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("rtx 4090 24GB", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("RTX 4060 Ti 16GB", "rtx4060ti-16gb"),
        ("A100 80GB", "a100-80gb"),
        ("a100_80gb", "a100-80gb"),
        ("a10080gb", "a100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA RTX A6000", "a6000"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("NVIDIA L4 24GB", "l4"),
        ("L40S 48 GB", "l40s"),
    ],
)
def test_a_card_is_known_by_what_drivers_and_shops_call_it(text: str, name: str) -> None:
    assert gpu_memory(text).name == name


@pytest.mark.parametrize(
    ("name", "seen"),
    [("rtx4090", 23.6), ("a100-80gb", 79.1), ("t4", 14.75), ("l4", 22.1)],
)
def test_a_named_card_has_less_than_it_is_sold_with_for_the_driver_takes_some(name: str, seen: float) -> None:
    """`seen`: what PyTorch shows as total, in GiB."""
    assert 0.98 * seen < gpu_memory(name).nbytes / 2**30 <= seen


@pytest.mark.parametrize("text", ["a100", "V100", "rtx 4060 ti", "RTX 4090 16GB", "A100 60GB"])
def test_a_card_that_is_sold_with_other_memory_is_answered_with_what_there_is(text: str) -> None:
    model = text.lower().replace(" ", "").replace("16gb", "").replace("60gb", "")

    with pytest.raises(InvalidRequestError, match=f": {model}") as caught:
        gpu_memory(text)

    assert "Name one" in str(caught.value)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "rtx4091", "", "20", "-3GB", "0GB", "nanGB", "1e9999GB", "99999999999999999GB", "9" * 400 + "GB", "nvidia",
        "rtx5", "NVIDIA GeForce RTX 4090 Laptop GPU", "9" * 5000 + "gb x",
    ],
    ids=lambda text: f"{text:.20}",
)  # fmt: skip
def test_what_is_no_gpu_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        gpu_memory(text)


def test_a_misspelt_gpu_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(InvalidRequestError, match="Did you mean 'rtx4090'"):
        gpu_memory("rtx4091")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--targets", "q_proj,gate"), "'gate'"),
        (("--targets", ","), "targets is empty"),
        (("--targets", "gate_proj,lm"), "'lm'"),
        (("--seq", "0"), "sequence_length is 0"),
        (("--dropout", "1"), "dropout is 1.0"),
        (("--gpu", "big"), "'big'"),
        (("--pruning-ratio", "1"), "pruning_ratio is 1.0"),
    ],
)
def test_bad_requests_are_refused_by_name(config: Path, arguments: tuple[str, ...], words: str) -> None:
    code, found = command(config, *arguments)

    assert code == InvalidRequestError.exit_code
    assert words in found["error"]["message"]


def test_lora_on_the_lm_head_is_refused_as_by_the_fine_tuning(config: Path) -> None:
    code, found = command(config, "--targets", "q_proj,lm_head")

    assert code == UnsupportedAdapterError.exit_code
    assert "TRL computes the loss from its weight directly" in found["error"]["message"]


@pytest.mark.parametrize(
    "options",
    [{"pruning_ratio": 0.5}, {"quantized": False}, {"keep_first": 9}, {"keep_last": 0}, {"round_to": 64}],
    ids=lambda options: str(next(iter(options))),
)
def test_a_release_takes_nothing_that_its_plan_decides(releases: dict[str, Path], options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="is a release"):
        estimate_memory(releases["nf4"], **options)


def test_the_command_line_refuses_it_too_and_leaves_what_was_not_given(releases: dict[str, Path]) -> None:
    code, found = command(releases["nf4"], "--keep-first", "9", "--round-to", "64")
    untouched, _ = command(releases["nf4"])

    assert (code, untouched) == (InvalidRequestError.exit_code, 0)
    assert "the rounding" in found["error"]["message"]


def test_whole_layers_without_a_ratio_decide_which_ratio_fits(config: Path) -> None:
    few, many = (command(config, "--keep-first", str(count))[1]["smallest_ratio"] for count in (1, 12))

    assert few < command(config)[1]["smallest_ratio"] < many


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a release nor a base model"):
        estimate_memory(tmp_path)


def test_tied_embeddings_take_both_options_or_none(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(dump_json(BASES["HuggingFaceTB/SmolLM2-135M-Instruct"][0]), encoding="utf-8")

    with pytest.raises(InvalidRequestError, match="one weight for both"):
        estimate_memory(path, shape=TrainingShape(options=MemoryOptions(embedding="cpu")))
    small = estimate_memory(path, gpu="1GB", shape=TrainingShape(micro_batch=32))
    tied = [each for each in small.advice if "tied" in each.change]
    assert [each.option for each in tied] == ["--embedding int8 --lm-head int8"]


def test_the_guide_shows_what_the_formulas_give(tmp_path: Path) -> None:
    guide = (Path(__file__).resolve().parents[1] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in guide.splitlines() if line.count("|") == 9]
    table = [row for row in rows if row[-1] == "not measured"]
    assert len(table) == 16
    ids = {"Llama-2-13B": "meta-llama/Llama-2-13b-hf", "Llama-2-70B": "meta-llama/Llama-2-70b-hf"}

    for base, ratio, micro_batch, tensors, _, estimate, with_options, _ in table:
        config, _ = BASES[ids.get(base, f"meta-llama/{base}")]
        file = tmp_path / base / "config.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(config))
        shape = TrainingShape(micro_batch=int(micro_batch))
        asked: dict[str, Any] = {"pruning_ratio": None if ratio == "unpruned" else float(ratio)}

        plain = estimate_memory(file, shape=shape, **asked).breakdown
        reduced = estimate_memory(
            file, shape=replace(shape, options=MemoryOptions(embedding="cpu", lm_head="nf4")), **asked
        )

        totals = (plain.tensors - plain.optimizer, plain.total, reduced.breakdown.total)
        assert [f"{nbytes / 2**30:.2f}" for nbytes in totals] == [tensors, estimate, with_options], (base, ratio)
