"""A thousand flipped bytes and bits, over all files of releases and of a recovered adapter: every one is found.

No file is spared: each gets its share by size, and at least twenty flips, so that small files (manifest, config,
licence) are hit as thoroughly as the weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from trust.subjects import build_subjects

from loram_hub.errors import LoramError
from loram_hub.inspection import verify

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

FLIPS = 1000
LEAST_PER_FILE = 20
SEED = 20_261_122


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subjects")
    build_subjects(folder)
    return folder


def places(folder: Path, count: int, rng: random.Random) -> list[tuple[Path, int]]:
    """Choose `count` positions over all files of a folder: some in each, the rest by size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    chosen = [path for path in files for _ in range(LEAST_PER_FILE)]
    chosen += rng.choices(files, weights=[path.stat().st_size for path in files], k=count - len(chosen))
    assert {path.name for path in chosen} == {path.name for path in files}
    return [(path, rng.randrange(path.stat().st_size)) for path in chosen]


@pytest.mark.parametrize("mode", ["byte", "bit"])
@pytest.mark.parametrize("subject", ["nf4", "bf16", "recovered"])
def test_every_flip_is_found(subjects: Path, subject: str, mode: str, figure: Callable[[str], None]) -> None:
    folder, rng = subjects / subject, random.Random(f"{SEED} {subject} {mode}")
    found = 0
    for path, position in places(folder, FLIPS, rng):
        original = path.read_bytes()
        flip = 1 << rng.randrange(8) if mode == "bit" else rng.randrange(1, 256)
        path.write_bytes(original[:position] + bytes([original[position] ^ flip]) + original[position + 1 :])
        try:
            verify(folder)
        except LoramError:
            found += 1
        else:
            pytest.fail(f"{path.name}: byte {position} xor {flip:#04x} was not found")
        finally:
            path.write_bytes(original)

    verify(folder)
    assert found == FLIPS
    figure(f"{found} of {FLIPS} flipped {mode}s of {subject} found")
