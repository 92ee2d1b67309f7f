"""Push and pull as one, on the loopback Hub; and on a real Hub for those who ask for it, see `live_hub.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import projections, random_factors, save_adapter, save_base, save_tokenizer, tiny_config
from live_hub import Place

from loram_hub.pruning import prune
from loram_hub.recovery import recover
from loram_hub.release import open_metadata

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_release_and_adapter_arrive_as_they_were_sent(place: Place, tmp_path: Path, xet: bool) -> None:
    base = save_tokenizer(save_base(tmp_path / "base", tiny_config(layers=3), dtype="bfloat16"))
    (base / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    release = prune(base, tmp_path / "release", importance="random", keep_first=1, keep_last=1).folder
    tensors = random_factors(projections(open_metadata(release).plan))
    recover(save_adapter(tmp_path / "pruned", tensors, base="org/x"), tmp_path / "adapter", release=release)
    (tmp_path / "adapter" / "LICENSE").write_text((base / "LICENSE").read_text())

    def loram(home: str, *arguments: str | Path) -> str:
        environment = place.environment(place.home / home, xet) | {"PYTHONPATH": os.fspath(ROOT)}
        command = [sys.executable, "-m", "loram_hub", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for folder in (release, tmp_path / "adapter"):
        repo = place.new_repo()
        options = ("--private", "--license", "apache-2.0", "--tag", "v1", "--json")
        first = json.loads(loram("publisher", "push", folder, repo, *options))
        again = json.loads(loram("publisher", "push", folder, repo, *options))
        assert (again["commit"], again["new_bytes"], again["private"]) == (first["commit"], 0, True)
        verified = json.loads(loram("consumer", "verify", repo, "--revision", "v1", "--json"))
        assert (verified["intact"], verified["commit"]) == (True, first["commit"])
        fetched = Path(place.client("answer(snapshot_download(sys.argv[1]))", repo, xet=xet, home="third"))
        assert all((fetched / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())
