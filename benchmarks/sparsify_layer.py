"""Time of a layer under streamed SparseGPT against the algorithm in plain torch, and peak memory as models get deeper.

Time: models of two layers, in the sizes of SmolLM2-135M's layer and of Llama-3-8B's with a quarter of the width; rows
of 2,048 tokens. The streamed run is `prune_layers` with its default settings: it reads the weights, collects Hessians,
prunes, writes each layer to disk, and runs it again. The plain run has the model in memory and writes nothing: forward
hooks with a Hessian for every matrix, Cholesky of H, its inverse, Cholesky of that, then columns one by one in blocks
of 128 (arXiv 2301.00774, algorithm 1), all in fp32. Both take turns in one process; the shortest of the repeats counts.
Processor time is told besides, for machines that have other work. How many of the masks' entries agree is told as well:
they differ where scores are equal to rounding.

Memory: Llama shapes, hidden 768, 12 query and 6 KV heads of 64, 2,048 MLP channels; vocabulary 1,024; 8 samples of
128 tokens. Each depth has a process of its own. The target is on its whole peak, imports included: that is what a
machine must have, and 24 layers more, of 26 MB each, could not stay in memory unseen. `growth_above_import` is told
besides.

Weights and tokens are random: time and memory hardly depend on their values. Of quality nothing is said here, and masks
of a trained model may agree otherwise (see `sparse_loss`).

    python benchmarks/sparsify_layer.py [--quick]
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import measured, report, scratch_folder, serve_actions, stopwatch

LAYERS, TOKENS, REPEATS, BLOCK, DAMPENING = 2, 2048, 2, 128, 0.01
SIZES = {
    "smollm2_135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "llama_8b_quarter": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
}
DEEP = SIZES["smollm2_135m"] | {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
}
QUICK = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ASKED = {"unstructured": {"sparsity": 0.5}, "4:8": {"pattern": "4:8"}}
SAMPLES, DEEP_SAMPLES, DEEP_TOKENS = 4, 8, 128
DEPTHS, QUICK_DEPTHS = (8, 16, 32), (2,)
SLOWER, FLAT = 1.5, 1.10
"""Most that a streamed layer may take of the plain one's time, and that the peak may grow with depth."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of streamed SparseGPT.")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that the script works, proves nothing")
    parser.add_argument("--work-dir", help="where to put the temporary checkpoints; default: the system's own")
    options = parser.parse_args()
    depths, deep = (QUICK_DEPTHS, QUICK) if options.quick else (DEPTHS, DEEP)
    tokens, repeats = (64, 1) if options.quick else (TOKENS, REPEATS)

    figures: dict[str, Any] = {"layer_seconds": {}, "memory": {}}
    with scratch_folder("sparsify", options.work_dir) as work:
        for name, sizes in ({"quick": QUICK} if options.quick else SIZES).items():
            folder = str(work / name)
            measured(__file__, "make_base", folder=folder, layers=LAYERS, sizes=sizes)
            times = measured(__file__, "time_layers", folder=folder, tokens=tokens, repeats=repeats)
            figures["layer_seconds"] |= {f"{name} {asked}": times[asked] for asked in ASKED}
        figures["import_rss"] = measured(__file__, "only_import")["peak_rss"]
        for layers in depths:
            folder = str(work / f"deep-{layers}")
            figures["layer_bytes"] = measured(__file__, "make_base", folder=folder, layers=layers, sizes=deep)["layer"]
            figures["memory"][layers] = measured(__file__, "prune_deep", folder=folder)
            shutil.rmtree(folder)

    peaks = [run["peak_rss"] for run in figures["memory"].values()]
    figures["slowest"] = max(run["ratio"] for run in figures["layer_seconds"].values())
    figures["growth"] = max(peaks) / peaks[0]
    figures["growth_above_import"] = (max(peaks) - figures["import_rss"]) / (peaks[0] - figures["import_rss"])
    report(
        "sparsify_layer",
        quick=options.quick,
        figures=figures,
        target=f"a streamed layer takes at most {SLOWER} times the plain one's time, and the peak grows at most "
        f"{FLAT - 1:.0%} from {depths[0]} to {depths[-1]} layers",
        met=figures["slowest"] <= SLOWER and figures["growth"] <= FLAT,
    )


def only_import() -> dict[str, Any]:
    import transformers.models.llama.modeling_llama

    import loram_hub.sparsification.sparsifying  # noqa: F401

    assert transformers.models.llama.modeling_llama
    return {}


def make_base(folder: str, layers: int, sizes: dict[str, int]) -> dict[str, Any]:
    import torch
    from synthetic import layer_bytes, llama_config, write_checkpoint

    config = llama_config(**sizes, num_hidden_layers=layers, vocab_size=1024)
    write_checkpoint(Path(folder), config, dtype=torch.float32)
    return {"layer": layer_bytes(config)}


def prune_deep(folder: str) -> dict[str, Any]:
    only_import()
    with stopwatch() as seconds:
        _prune_streamed(Path(folder), _calibration(DEEP_SAMPLES, DEEP_TOKENS), "4:8")
    return {"seconds": seconds()}


def time_layers(folder: str, tokens: int, repeats: int) -> dict[str, Any]:
    only_import()
    return {asked: _compare(Path(folder), asked, _calibration(SAMPLES, tokens), repeats) for asked in ASKED}


def _compare(folder: Path, asked: str, ids: Any, repeats: int) -> dict[str, Any]:  # noqa: ANN401 (torch is not imported up here)
    seconds: dict[str, list[float]] = {"streamed": [], "plain": [], "streamed_processor": [], "plain_processor": []}
    agreeing = 0.0
    for _ in range(repeats):
        with _clocks(seconds, "streamed"):
            masks = _prune_streamed(folder, ids, asked)
        model = _plain_model(folder)
        with _clocks(seconds, "plain"):
            expected = _prune_plain(model, ids, asked)
        agreeing = sum(float((masks[name] == kept).sum()) for name, kept in expected.items())
        agreeing /= sum(kept.numel() for kept in expected.values())
    return {
        **seconds,
        "ratio": min(seconds["streamed"]) / min(seconds["plain"]),
        "processor_ratio": min(seconds["streamed_processor"]) / min(seconds["plain_processor"]),
        "agreeing_mask_entries": agreeing,
        "calibration": list(ids.shape),
    }


@contextmanager
def _clocks(seconds: dict[str, list[float]], kind: str) -> Iterator[None]:
    """Note how long a block takes for each layer, and how much of processors."""
    started = time.process_time()
    with stopwatch() as passed:
        yield
    seconds[f"{kind}_processor"].append((time.process_time() - started) / LAYERS)
    seconds[kind].append(passed() / LAYERS)


def _prune_streamed(folder: Path, ids: Any, asked: str) -> dict[str, Any]:  # noqa: ANN401 (torch is not imported up here)
    import torch

    from loram_hub.architecture import architecture_of
    from loram_hub.checkpoint import Checkpoint
    from loram_hub.sparsification import SparsitySettings
    from loram_hub.sparsification.counts import projection_shapes
    from loram_hub.sparsification.finished import FinishedLayers
    from loram_hub.sparsification.layers import prune_layers

    settings = SparsitySettings(**ASKED[asked])
    with Checkpoint(folder) as checkpoint:
        architecture = architecture_of(checkpoint.config)
        finished = FinishedLayers(folder / "finished", {}, settings.mask_pattern)
        prune_layers(checkpoint, architecture, ids, settings, finished, device=None)
        masks = {}
        if architecture.num_hidden_layers == LAYERS:
            for name, (_, columns) in projection_shapes(architecture).items():
                layer = int(name.split(".")[2])
                masks[name] = torch.from_numpy(finished.mask(layer, name, columns))
        finished.remove()
    return masks


def _plain_model(folder: Path) -> Any:  # noqa: ANN401
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _prune_plain(model: Any, ids: Any, asked: str) -> dict[str, Any]:  # noqa: ANN401
    """Prune a model that is in memory; returns what is kept of each matrix."""
    import torch
    from torch import nn

    kept: dict[str, Any] = {}
    with torch.no_grad():
        hidden = torch.cat([model.model.embed_tokens(sample) for sample in ids.split(1)])
        positions = torch.arange(ids.shape[1])[None]
        rotary = model.model.rotary_emb(hidden[:1], positions)
        for number, layer in enumerate(model.model.layers):
            linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
            hessians = {name: torch.zeros(module.in_features, module.in_features) for name, module in linears.items()}
            handles = [
                module.register_forward_pre_hook(_adder(hessians[name], len(ids))) for name, module in linears.items()
            ]
            for sample in hidden.split(1):
                layer(sample, position_embeddings=rotary)
            for handle in handles:
                handle.remove()
            for name, module in linears.items():
                kept[f"model.layers.{number}.{name}.weight"] = _plain_sparsegpt_(
                    module.weight, hessians.pop(name), **ASKED[asked]
                )
            if number + 1 < len(model.model.layers):
                for sample in hidden.split(1):
                    output = layer(sample, position_embeddings=rotary)
                    sample.copy_(output[0] if isinstance(output, tuple) else output)
    return kept


def _adder(hessian: Any, samples: int) -> Any:  # noqa: ANN401
    def add(_: Any, args: tuple[Any, ...]) -> None:  # noqa: ANN401
        inputs = args[0].flatten(0, -2)
        hessian.add_(inputs.T @ inputs, alpha=2 / samples)

    return add


def _plain_sparsegpt_(weight: Any, hessian: Any, *, sparsity: float = 0.0, pattern: str | None = None) -> Any:  # noqa: ANN401
    """Algorithm 1 of the paper, with the inverse's Cholesky factor; prunes in place and returns what is kept."""
    import torch

    keeps, group = (int(part) for part in pattern.split(":")) if pattern else (0, 0)
    hessian.diagonal().add_(DAMPENING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    spread = upper.diagonal()
    kept = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        if not group:
            scores = (weight[:, start:stop] ** 2 / spread[start:stop] ** 2).flatten()
            lowest = scores.argsort()[: int(sparsity * scores.numel())]
            kept[:, start:stop] = (
                torch.ones_like(scores, dtype=torch.bool).scatter(0, lowest, False).view(len(weight), -1)
            )
        errors = torch.zeros(len(weight), stop - start)
        for column in range(start, stop):
            if group and column % group == 0:
                members = slice(column, column + group)
                scores = weight[:, members] ** 2 / spread[members] ** 2
                lowest = scores.topk(group - keeps, dim=1, largest=False).indices
                kept[:, members] = torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False)
            error = torch.where(kept[:, column], 0.0, weight[:, column]) / spread[column]
            weight[:, column:stop] -= torch.outer(error, upper[column, column:stop])
            errors[:, column - start] = error
        weight[:, start:stop] *= kept[:, start:stop]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return kept


def _calibration(samples: int, tokens: int) -> Any:  # noqa: ANN401
    import torch

    return torch.randint(0, 1024, (samples, tokens), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    serve_actions(only_import, make_base, time_layers, prune_deep)
    main()
