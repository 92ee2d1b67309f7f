"""Peak memory of streamed Taylor importance against a plain full-model backward, as the model gets deeper.

Llama shapes: hidden 1,024, 16 query and 8 KV heads of 64, 3,072 MLP channels: 12.6 M parameters or 50.3 MB of fp32 in a
decoder layer; vocabulary 1,024; 10 samples of 64 tokens, LLM-Pruner's calibration. Both compute `taylor:param_first` in
fp32 on the CPU. The streamed scores are `importance_scores` with its default batch of 8 samples.

The full backward is the leanest plain one: weights read one tensor at a time into the model (no second copy, no
memory-mapped pages), samples one by one with gradients added up. It holds weights and gradients of all layers at once.

Each run has a process of its own. The targets are on its whole peak, imports included; `import_rss` is what a process
that imports the same modules and does nothing else needs. At the least depth the scores of both are compared.

    python benchmarks/taylor_memory.py [--quick]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from measuring import measured, report, scratch_folder, serve_actions, stopwatch

SAMPLES, TOKENS = 10, 64
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 1024,
}
QUICK_SIZES = SIZES | {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
DEPTHS, QUICK_DEPTHS = (8, 16, 32), (2,)
FLAT, SHARE = 1.10, 1 / 3
"""Most that the streamed peak may grow from the least depth to the greatest, and its largest share of the full one."""
AGREE = 1e-5
"""Largest relative difference of a score: both add up thousands of fp32 terms in different orders."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of streamed Taylor importance.")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that the script works, proves nothing")
    parser.add_argument("--work-dir", help="where to put the temporary checkpoints; default: the system's own")
    options = parser.parse_args()
    depths, sizes = (QUICK_DEPTHS, QUICK_SIZES) if options.quick else (DEPTHS, SIZES)

    figures: dict[str, Any] = {"import_rss": measured(__file__, "only_import")["peak_rss"], "streamed": {}, "full": {}}
    with scratch_folder("taylor", options.work_dir) as work:
        for layers in depths:
            folder = str(work / f"base-{layers}")
            figures["layer_bytes"] = measured(__file__, "make_base", folder=folder, layers=layers, sizes=sizes)["layer"]
            for kind in ("streamed", "full"):
                scores = str(work / f"{kind}-{layers}.npz")
                figures[kind][layers] = measured(__file__, f"{kind}_scores", folder=folder, scores=scores)
        figures |= _difference(work / f"streamed-{depths[0]}.npz", work / f"full-{depths[0]}.npz")

    streamed, full = ({n: run["peak_rss"] for n, run in figures[kind].items()} for kind in ("streamed", "full"))
    figures["growth"] = max(streamed.values()) / streamed[depths[0]]
    figures["share_of_full"] = streamed[depths[-1]] / full[depths[-1]]
    imported = figures["import_rss"]
    figures["growth_above_import"] = (max(streamed.values()) - imported) / (streamed[depths[0]] - imported)
    figures["share_of_full_above_import"] = (streamed[depths[-1]] - imported) / (full[depths[-1]] - imported)
    report(
        "taylor_memory",
        quick=options.quick,
        figures=figures,
        target=f"streamed peak grows at most {FLAT - 1:.0%} from {depths[0]} to {depths[-1]} layers, is under a third "
        f"of the full backward's at {depths[-1]}, and the scores agree to {AGREE}",
        met=figures["growth"] <= FLAT and figures["share_of_full"] < SHARE and figures["scores_difference"] <= AGREE,
    )


def _difference(first: Path, second: Path) -> dict[str, Any]:
    with np.load(first) as a, np.load(second) as b:
        if set(a.files) != set(b.files):
            raise SystemExit(f"taylor_memory: scores of {sorted(set(a.files) ^ set(b.files))} are in one run alone.")
        worst = max(float(np.max(np.abs(a[name] - b[name]) / np.abs(b[name]))) for name in a.files)
        return {"scores_difference": worst, "scores_compared": sum(a[name].size for name in a.files)}


def only_import() -> dict[str, Any]:
    import transformers.models.llama.modeling_llama

    import loram_hub.importance  # noqa: F401

    assert transformers.models.llama.modeling_llama
    return {}


def make_base(folder: str, layers: int, sizes: dict[str, int]) -> dict[str, Any]:
    import torch
    from synthetic import layer_bytes, llama_config, write_checkpoint

    config = llama_config(**sizes, num_hidden_layers=layers)
    write_checkpoint(Path(folder), config, dtype=torch.float32)
    return {"layer": layer_bytes(config)}


def streamed_scores(folder: str, scores: str) -> dict[str, Any]:
    from loram_hub.architecture import architecture_of
    from loram_hub.checkpoint import Checkpoint
    from loram_hub.importance import importance_scores, parse_importance

    with Checkpoint(Path(folder)) as checkpoint, stopwatch() as seconds:
        architecture = architecture_of(checkpoint.config)
        found = importance_scores(
            checkpoint,
            architecture,
            range(architecture.num_hidden_layers),
            importance=parse_importance("taylor:param_first"),
            calibration=_calibration(architecture.vocab_size),
        )
    np.savez(
        scores, **{f"{layer}.{space}": values for layer, spaces in found.items() for space, values in spaces.items()}
    )
    return {"seconds": seconds()}


def full_scores(folder: str, scores: str) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from loram_hub.checkpoint import Checkpoint

    with Checkpoint(Path(folder)) as checkpoint, stopwatch() as seconds:
        config = LlamaConfig.from_dict(dict(checkpoint.config))
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.to_empty(device="cpu")
        model.model.rotary_emb.__init__(config)  # its frequencies are computed, not stored
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(checkpoint.read(name))
        ids = _calibration(config.vocab_size)
        for sample in ids.split(1):
            (model(input_ids=sample, labels=sample, use_cache=False).loss / len(ids)).backward()
        found = {}
        for number, layer in enumerate(model.model.layers):
            found[f"{number}.kv_heads"], found[f"{number}.channels"] = _plain_group_sums(layer, config)
    np.savez(scores, **found)
    return {"seconds": seconds()}


def _plain_group_sums(layer: Any, config: Any) -> tuple[Any, Any]:  # noqa: ANN401 (torch is not imported up here)
    """Sum |w g| over each KV head (with its query heads) and each MLP channel, written out for Llama."""
    elements = {name: (p * p.grad).detach().abs() for name, p in layer.named_parameters() if p.ndim == 2}
    attention = {name: elements[f"self_attn.{name}_proj.weight"] for name in ("q", "k", "v", "o")}
    heads = config.num_key_value_heads
    kv_heads = attention["o"].sum(0).view(heads, -1).sum(1)
    for name in ("q", "k", "v"):
        kv_heads = kv_heads + attention[name].sum(1).view(heads, -1).sum(1)
    gate, up, down = (elements[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return kv_heads.numpy(), (gate.sum(1) + up.sum(1) + down.sum(0)).numpy()


def _calibration(vocab_size: int) -> Any:  # noqa: ANN401 (torch is not imported up here)
    import torch

    return torch.randint(0, vocab_size, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    serve_actions(only_import, make_base, streamed_scores, full_scores)
    main()
