"""A sparsification that is killed again and again goes on each time, and ends with the bytes of an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import save_base, tiny_config
from killed import bytes_of, run_killed

pytestmark = pytest.mark.slow

KILLS = 6
LAYERS = 12


def test_a_killed_run_goes_on_and_ends_with_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    base = save_base(tmp_path / "base", tiny_config(layers=LAYERS))
    ids = torch.randint(3, 53, (4, 16), generator=torch.Generator().manual_seed(0))
    out, log = tmp_path / "out", tmp_path / "layers"

    at_work = run_killed(
        "import torch, transformers.models.llama.modeling_llama\n"
        "from loram_hub.sparsification import SparsitySettings, sparsify\n"
        "import loram_hub.sparsification.sparsifying",
        "sparsify(base, out, settings=SparsitySettings(sparsity=0.5), calibration=torch.tensor(ids), overwrite=True)",
        "assert not Path(out).exists() or bytes_of(Path(out)) == bytes_of(Path(f'{out}-timed'))\n"
        "there = len([*Path(out).with_name('.out.sparsifying').glob('layer-*.json')])\n"
        "Path(log).open('a').write(f'{there}\\n')",
        kills=KILLS,
        base=str(base),
        ids=ids.tolist(),
        out=str(out),
        log=str(log),
    )

    finished = [int(line) for line in log.read_text().split()]
    assert at_work >= 3
    assert [count for count in finished if 0 < count < LAYERS]  # the next run went on from there
    assert bytes_of(out) == bytes_of(tmp_path / "out-timed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "layers", "out", "out-timed"]
    figure(
        f"sparsify: {at_work} kills before the end, after which {finished} layers of {LAYERS} were finished; the last "
        "run ended as an undisturbed one"
    )
