"""What the commands of the trust tests are run on, and those commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders import projections, random_factors, save_adapter, save_base, save_tokenizer, tiny_config
from trust.forks import Forks

from loram_hub.release import open_release

LICENCE = "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy of this model\n"
RANDOM = ("--importance", "random", "--keep-first", "1", "--keep-last", "1", "--pruning-ratio", "0.4")
RANK = 64


class Materials:
    """A base model, three releases of it, and the adapter trained on one of them before and after its recovery.

    Args:
        folder: Where to make them.
        forks: Runs the commands that make them.
        **sizes: What the base's config has other than `tiny_config`.
    """

    def __init__(self, folder: Path, forks: Forks, **sizes: Any) -> None:
        config = tiny_config(**sizes)
        self.base = save_base(folder / "base", config, dtype="bfloat16")
        save_tokenizer(self.base, config["vocab_size"])
        (self.base / "LICENSE").write_text(LICENCE)
        self.release, self.nf4, self.old = folder / "release", folder / "nf4", folder / "old"
        for out, *options in ((self.release,), (self.nf4, "--quantize"), (self.old, "--seed", "1")):
            self._run(forks, "prune", self.base, out, *RANDOM, *options)
            self._run(forks, "card", out, "--repo-id", "alice/release", "--license", "mit")
        shapes = projections(open_release(self.release).plan)
        self.adapter = save_adapter(folder / "adapter", random_factors(shapes, rank=RANK), base=self.release, r=RANK)
        self.recovered = folder / "recovered"
        self._run(forks, "recover", self.adapter, self.recovered)

    @staticmethod
    def _run(forks: Forks, *command: str | Path) -> None:
        ended = forks.run(*command)
        assert ended.status == 0, ended

    def writer(self, name: str, out: Path, *options: str) -> tuple[str | Path, ...]:
        """Return the command of that name, which writes the folder `out`."""
        inputs: dict[str, tuple[str | Path, ...]] = {
            "prune": ("prune", self.base, out, *RANDOM),
            "prune to NF4": ("prune", self.base, out, *RANDOM, "--quantize"),
            "quantize": ("quantize", self.release, out),
            "recover": ("recover", self.adapter, out),
            "merge": ("merge", self.base, self.recovered, out),
        }
        return (*inputs[name], *options)
