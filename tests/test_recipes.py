"""Every recipe and script of `publish/`, run with a tiny model in place of the base."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from base_configs import BASES
from hub_client import python
from hub_server import HubServer
from pipeline_materials import save_texts, save_tiny_base, tiny_recipe, write_recipe
from torch.distributed.run import get_args_parser

from loram_hub.alignment.estimates import estimate
from loram_hub.architecture import Architecture, architecture_of
from loram_hub.corpora import Corpus
from loram_hub.licences import duties, licence_of
from loram_hub.manifest import Pruning, Sparsification, read_manifest
from loram_hub.pipeline import Recipe, publish, read_recipe
from loram_hub.pipeline.preview import (
    describe,
    hours_text,
    plan_of_any_groups,
    size_text,
    sparse_counts_of,
    stage_costs,
)
from loram_hub.plan import parameter_counts, planned_sizes

PUBLISH = Path(__file__).parents[1] / "publish"
RECIPES = (
    "llama-2-13b", "llama-2-13b-semi", "llama-2-13b-unst", "llama-2-70b", "llama-2-70b-0.75", "llama-3.1-70b",
    "llama-3.1-8b", "mistral-small", "qwen2.5-72b", "qwen3-32b", "smollm2-135m", "smollm2-135m-semi",
    "smollm2-135m-unst",
)  # fmt: skip
SHRUNK = tuple(name for name in RECIPES if name not in ("llama-2-13b-unst", "smollm2-135m-semi"))
"""Recipes that are run with a tiny model; the two others are then like two of these, and that of SmolLM2 is run with
the real one (test_sparse_real_model.py)."""
SCRIPTS = ("release.sh", "slurm.sh", "torchrun.sh")  # the first is run by test_end_to_end.py
THE_PAPERS = {
    "llama-2-13b": 6_005_662_720,
    "llama-2-13b-semi": 6_671_979_520,  # the 1.95x of its tables 1 to 3; its table 4 has LLaMA-2-7B's count there
    "llama-2-13b-unst": 6_037_591_040,  # its table 4 has 37,872 more
    "llama-2-70b": 16_272_924_672,
    "llama-2-70b-0.75": 21_488_738_304,
    "llama-3.1-70b": 17_849_982_976,
}


def recipe_of(name: str) -> Recipe:
    return read_recipe(PUBLISH / f"{name}.yaml")


def test_these_are_all_recipes_and_scripts() -> None:
    assert RECIPES
    assert sorted(path.name for path in PUBLISH.iterdir()) == sorted(
        ["README.md", "publish.ipynb", *(f"{name}.yaml" for name in RECIPES), *SCRIPTS]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_figures_at_the_head_of_a_recipe_are_what_the_estimate_gives(name: str) -> None:
    recipe = recipe_of(name)
    text = (PUBLISH / f"{name}.yaml").read_text()
    head = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]

    lines = describe(recipe, architecture_of(BASES[recipe.base][0]))

    assert lines == head[1 : 1 + len(lines)]
    assert len(lines) >= 5


def counts_of(recipe: Recipe, architecture: Architecture) -> tuple[int, int]:
    """Return the parameters of base and pruned model."""
    if recipe.prune.is_sparse:
        sparse = sparse_counts_of(recipe, architecture)
        return sparse.original_parameters, sparse.pruned_parameters
    counts = parameter_counts(architecture, planned_sizes(architecture, recipe.prune.structure))
    return counts.original_parameters, counts.pruned_parameters


def removed_in_name(recipe: Recipe) -> str:
    """Return how a release's name says what was removed: -0.65, -Semi-4of8 or -Unst-0.55."""
    if not recipe.prune.is_sparse:
        return f"-{recipe.prune.structure.pruning_ratio:g}"
    settings = recipe.prune.sparsity_settings
    return (
        f"-Unst-{settings.sparsity:g}" if settings.pattern is None else f"-Semi-{settings.pattern.replace(':', 'of')}"
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_suits_its_base(name: str) -> None:
    recipe = recipe_of(name)
    config, parameters = BASES[recipe.base]
    architecture = architecture_of(config)

    original, pruned = counts_of(recipe, architecture)

    assert original == parameters
    assert pruned == THE_PAPERS.get(name, pruned) < parameters
    assert removed_in_name(recipe) in recipe.repo_id
    unmet = duties(licence_of(recipe.base), repo_name=recipe.repo_id, documents={}, card="")
    assert not [duty.how for duty in unmet if duty.what.startswith("the name") and not duty.met]
    assert recipe.align is not None
    assert recipe.hardware is not None
    assert (recipe.align.settings.processes or 1) == recipe.hardware.count


def removed_by(pruning: Pruning | Sparsification) -> str:
    """Return what was removed from a release, in the words of `removed_in_name`."""
    if isinstance(pruning, Pruning):
        return f"-{pruning.pruning_ratio:g}"
    is_semi = pruning.pattern != "unstructured"
    return f"-Semi-{pruning.pattern.replace(':', 'of')}" if is_semi else f"-Unst-{pruning.sparsity:g}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    save_texts(folder / "texts.jsonl", count=120)
    return folder


def shrunk(recipe: Recipe, place: Path) -> Recipe:
    """Return a recipe for a tiny model of the same family and local texts, in one process on the CPU."""
    model_type = str(BASES[recipe.base][0]["model_type"])
    base = place / f"tiny-{model_type}{'-sparse' if recipe.prune.is_sparse else ''}"
    # Inputs in groups of eight; and no layer stays whole, so that there need not be many.
    grouped: dict[str, Any] = {"head_dim": 8, "intermediate_size": 40, "layers": 2}
    if not base.exists():
        save_tiny_base(base, model_type=model_type, **(grouped if recipe.prune.is_sparse else {"layers": 8}))
    few_texts: dict[str, Any] = {"samples": 4, "tokens": 32} if recipe.prune.is_sparse else {}
    texts = str(place / "texts.jsonl")
    assert recipe.align is not None
    assert recipe.evaluate is not None
    few = replace(
        recipe.align.settings, steps=2, warmup_steps=1, batch_size=2, sequence_length=16, held_out=1, processes=None,
        shuffle_window=16,
    )  # fmt: skip
    return replace(
        recipe,
        base=str(base),
        revision=None,
        license_file=None,
        device=None,
        prune=replace(recipe.prune, calibration=texts, **few_texts),
        align=replace(recipe.align, settings=few, corpora=(Corpus(source=texts),), launcher=()),
        evaluate=replace(recipe.evaluate, data=texts, limit=2, max_tokens=16, device=None),
        push=None,
    )


def test_every_recipe_makes_a_release_that_can_be_pushed(place: Path) -> None:
    """Evaluation is run for the first recipe only: it is the same in all, and the longest of all stages."""
    for name in SHRUNK:
        recipe = recipe_of(name)
        small = shrunk(recipe, place)
        measured = ["evaluate"] if name == SHRUNK[0] else []
        published = publish(small if measured else replace(small, evaluate=None), work_dir=place / name)

        stages = [stage.name for stage in published.stages if stage.made]
        assert stages == ["prune", "align", "quantize", *measured, "card"], name
        manifest = read_manifest(published.release)
        assert removed_by(manifest.pruning) == removed_in_name(recipe)
        assert manifest.alignment is not None
        assert manifest.quantization is not None
        assert recipe.repo_id.partition("/")[2] in (published.release / "README.md").read_text()
        shutil.rmtree(place / name / "aligned-run")

    with HubServer(place / "hub") as hub:
        problems = python(
            hub,
            place / "home",
            """
from loram_hub.pushing import push
found = {}
for argument in sys.argv[1:]:
    folder, repo_id = argument.split("=")
    pushed = push(folder, repo_id, license="mit", dry_run=True)
    found[repo_id] = [list(pushed.problems), len(pushed.files)]
print(json.dumps(found))
""",
            *(f"{place / name / 'quantized'}={recipe_of(name).repo_id}" for name in SHRUNK),
        )
    assert len(problems) == len(SHRUNK)
    assert all(files > 8 and not stopped for stopped, files in problems.values()), problems


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_sound_shell(script: str) -> None:
    text = (PUBLISH / script).read_text()

    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert os.access(PUBLISH / script, os.X_OK)
    assert subprocess.run(["bash", "-n", PUBLISH / script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("slurm.sh", {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}),
        (
            "torchrun.sh",
            {"--nnodes", "--node-rank", "--master-addr", "--master-port", "--standalone", "--nproc-per-node"},
        ),
    ],
)
def test_the_options_that_scripts_give_to_torchrun_exist(script: str, expected: set[str]) -> None:
    lines = (PUBLISH / script).read_text().splitlines()
    code = "\n".join(line for line in lines if not line.startswith("#"))
    options = set(re.findall(r"--[a-z-]+", code.partition("srun --")[2].partition("torchrun")[2] or code))

    assert options == expected
    assert options <= set(get_args_parser()._option_string_actions)


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_the_slurm_script_trains_on_every_task_it_is_given(place: Path, tmp_path: Path) -> None:
    """With a stand-in for SLURM, but with a real torchrun and two real processes."""
    tools = tmp_path / "tools"
    tools.mkdir()
    executable(tools / "scontrol", 'echo "127.0.0.1"')
    executable(tools / "srun", 'while [[ $1 == -* ]]; do shift; done; echo "$@" >> "$SEEN"; exec "$@"')
    executable(tools / "loram", f'exec {sys.executable} -m loram_hub "$@"')
    bin_folder = Path(sys.executable).parent
    base = place / "tiny-llama"
    if not base.exists():
        save_tiny_base(base, layers=8)
    recipe = tiny_recipe(place) | {"base": str(base)}
    del recipe["evaluate"]
    recipe["align"] |= {"processes": 2}
    environment = os.environ | {
        "PATH": os.pathsep.join([str(tools), str(bin_folder), os.environ["PATH"]]),
        "PYTHONPATH": str(PUBLISH.parent), "SEEN": str(tmp_path / "seen"), "SLURM_GPUS_ON_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node[1-1]", "SLURM_JOB_ID": str(os.getpid()),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    done = subprocess.run(
        [PUBLISH / "slurm.sh", write_recipe(tmp_path / "recipe.yaml", recipe), "--work-dir", tmp_path / "work"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "torchrun --nnodes 1 --nproc-per-node 2" in (tmp_path / "seen").read_text()
    assert "Training in 2 process(es)" in done.stderr
    alignment = read_manifest(tmp_path / "work" / "aligned").alignment
    assert alignment is not None
    assert alignment["steps"] == 4


def test_the_slurm_script_queues_its_job_again_before_the_time_limit(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    executable(tmp_path / "scontrol", f'[[ $1 == show ]] && echo host || echo "$@" >> {seen}')
    executable(tmp_path / "loram", f'echo "cores $SRUN_CPUS_PER_TASK pid $$" >> {seen}; exec sleep 60')
    environment = {
        "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]), "SLURM_GPUS_ON_NODE": "8", "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "host", "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "64",
    }  # fmt: skip

    with subprocess.Popen([PUBLISH / "slurm.sh", "recipe.yaml"], env=environment, stderr=subprocess.PIPE) as job:
        while not (seen.exists() and seen.read_text().endswith("\n")):
            assert job.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)  # until bash waits
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == 0

    cores, queued = seen.read_text().splitlines()
    assert cores.startswith("cores 64 ")
    assert queued == "requeue 42"
    with pytest.raises(ProcessLookupError):
        os.kill(int(cores.rpartition(" ")[2]), 0)
    assert "#SBATCH --signal=B:USR1@" in (PUBLISH / "slurm.sh").read_text()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"GPUS": "2"}, "--standalone --nproc-per-node 2 -m loram_hub align a b --steps 3"),
        (
            {"NODES": "2", "NODE": "1", "HEAD": "host"},
            "--nnodes 2 --node-rank 1 --master-addr host --master-port 29500 --nproc-per-node gpu "
            "-m loram_hub align a b --steps 3",
        ),
    ],
)
def test_the_torchrun_script_starts_torchrun(tmp_path: Path, environment: dict[str, str], expected: str) -> None:
    executable(tmp_path / "torchrun", 'echo "$@"')
    path = {"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}

    done = subprocess.run(
        [PUBLISH / "torchrun.sh", "a", "b", "--steps", "3"],
        env={**path, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.stdout.strip() == expected
    refused = subprocess.run(
        [PUBLISH / "torchrun.sh", "a"], env={**path, "NODES": "2"}, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "the number of this machine" in refused.stderr


def test_the_guide_states_what_the_estimate_gives() -> None:
    guide = (PUBLISH.parent / "docs" / "publishing.md").read_text()
    recipe = recipe_of("llama-2-70b")
    assert recipe.hardware is not None
    architecture = architecture_of(BASES[recipe.base][0])

    for line in describe(recipe, architecture):
        assert line in guide.splitlines()
    for stage, cost in stage_costs(recipe, architecture).items():
        row = re.search(rf"^\| {stage} \|.*$", guide, re.MULTILINE)
        if row is not None:
            cells = [cell.strip() for cell in row[0].strip("|").split("|")][1:]
            stated = [size_of(nbytes) for nbytes in (cost.output_bytes, cost.scratch_bytes, cost.memory_bytes)]
            assert cells == [*stated, hours_text(cost.seconds(recipe.hardware))]
    sharded = re.findall(r"^\| (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \|$", guide, re.MULTILINE)
    assert [int(processes) for processes, _, _ in sharded] == [4, 8, 16]
    plan = plan_of_any_groups(architecture, recipe.prune.structure)
    for processes, held, gathered in sharded:
        found = estimate(plan, recipe.align_settings, precision="mixed", processes=int(processes))
        state = found.weight_bytes + found.gradient_bytes + found.optimizer_bytes
        assert (f"{state / 1e9:.1f}", f"{found.working_bytes / 1e9:.1f}") == (held, gathered)


def size_of(nbytes: int) -> str:
    return size_text(nbytes) if nbytes else ""
