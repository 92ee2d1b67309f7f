"""Two builds of the same things, in processes as unlike as two machines can be made to look: every byte is the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from builders import save_base, save_tokenizer, tiny_config
from trust.forks import ROOT
from trust.kills import content_of
from trust.materials import LICENCE

BUILD = """
import os, sys
from pathlib import Path
import torch
from builders import projections, random_factors, save_adapter
from loram_hub.cli import main
from loram_hub.release import open_release

def loram(*arguments):
    main([str(argument) for argument in arguments], standalone_mode=False)

os.umask(int(sys.argv[1], 8))
here = Path(sys.argv[2])
structure = ("--keep-first", "1", "--keep-last", "1", "--pruning-ratio", "0.4", "--seed", "3")
loram("prune", here / "base", here / "random", "--importance", "random", *structure)
loram("prune", here / "base", here / "magnitude", "--importance", "magnitude", *structure)
threads = torch.get_num_threads()
torch.set_num_threads(1)  # gradients add up in another order on more threads: scores may differ in the last bits
loram("prune", here / "base", here / "taylor", "--calibration", here / "texts.jsonl", *structure)
torch.set_num_threads(threads)
loram("prune", here / "base", here / "nf4", "--importance", "random", "--quantize", *structure)
loram("quantize", here / "random", here / "quantized")
shapes = projections(open_release(here / "random").plan)
save_adapter(here / "adapter", random_factors(shapes), base=(here / "random").absolute())
loram("recover", here / "adapter", here / "recovered")
loram("merge", here / "base", here / "recovered", here / "merged")
for folder in ("taylor", "nf4", "recovered"):
    loram("card", here / folder, "--repo-id", "org/name", "--license", "mit")
"""
BUILT = ("random", "magnitude", "taylor", "nf4", "quantized", "recovered", "merged")
WORLDS = [
    {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "TZ": "UTC", "LC_ALL": "C", "umask": "022"},
    {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8", "umask": "077"},
]


def save_inputs(folder: Path) -> None:
    """Write a base model and calibration texts."""
    config = tiny_config(hidden_size=120, intermediate_size=400, head_dim=20, vocab_size=200)
    base = save_tokenizer(save_base(folder / "base", config, dtype="bfloat16"), 200)
    (base / "LICENSE").write_text(LICENCE)
    texts = [{"text": " ".join(f"w{4 + (row * 31 + i * i) % 190}" for i in range(40))} for row in range(200)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


def build(folder: Path, world: dict[str, str], *, is_relative: bool) -> None:
    """Make everything of the inputs, in a new process."""
    home = folder / "home of the user"
    home.mkdir()
    environment = os.environ | world | {"HOME": str(home), "HF_HOME": str(home / "huggingface"), "USER": folder.name}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, world["umask"], "." if is_relative else str(folder)],
        cwd=folder if is_relative else folder.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp(name) / name for name in ("first", "the second one")]
    folders[0].mkdir()
    save_inputs(folders[0])
    shutil.copytree(folders[0], folders[1])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: build(folders[n], WORLDS[n], is_relative=n == 1), (0, 1)))
    return folders


@pytest.mark.parametrize("name", BUILT)
def test_two_builds_are_equal_to_the_byte(builds: list[Path], figure: Callable[[str], None], name: str) -> None:
    first, second = (content_of(folder / name) for folder in builds)

    assert len(first) >= 3
    assert second == first
    figure(f"{name}: {len(first)} files, equal in two builds")


@pytest.mark.parametrize("name", BUILT)
def test_no_file_holds_a_path_of_the_machine_that_made_it(builds: list[Path], name: str) -> None:
    for folder in builds:
        for path in (folder / name).rglob("*"):
            if path.is_file():
                assert os.fsencode(folder.parent) not in path.read_bytes(), path


def test_different_recipes_give_different_bytes(builds: list[Path]) -> None:
    weights = {content_of(builds[0] / name)["model.safetensors"] for name in ("random", "magnitude", "taylor", "nf4")}

    assert len(weights) == 4
