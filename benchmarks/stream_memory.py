"""Peak memory of the streamed teacher and of the refit, as the model gets deeper.

Llama shapes: hidden 1,024, 16 query and 8 KV heads of 64, 3,072 MLP channels: 12.6 M parameters or 50.3 MB of fp32 in a
decoder layer; vocabulary 4,096. The teacher keeps the 64 most probable tokens of 64 sequences of 128 tokens, in two
blocks. The refit solves a release of ratio 0.6, the first 4 and last 2 layers whole, on 16 x 128 tokens, to both of its
targets. All compute in fp32 on the CPU, with the defaults of the library.

Each run has a process of its own. The target is on its whole peak, imports included; `import_rss` is what a process
that imports the same modules and does nothing else needs, and `growth_above_import` leaves it out.

    python benchmarks/stream_memory.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from measuring import measured, report, scratch_folder, serve_actions, stopwatch

TOKENS, SEQUENCES, SAMPLES = 128, 64, 16
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 4096,
}
QUICK_SIZES = SIZES | {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
DEPTHS, QUICK_DEPTHS = (8, 32), (7,)
RUNS = ("teacher", "refit_output", "refit_residual")
FLAT = 1.10
"""Most that a peak may grow from the least depth to the greatest."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of the streamed teacher and of the refit.")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that the script works, proves nothing")
    parser.add_argument("--work-dir", help="where to put the temporary checkpoints; default: the system's own")
    options = parser.parse_args()
    depths, sizes = (QUICK_DEPTHS, QUICK_SIZES) if options.quick else (DEPTHS, SIZES)

    figures: dict[str, Any] = {"import_rss": measured(__file__, "only_import")["peak_rss"], **{run: {} for run in RUNS}}
    with scratch_folder("stream", options.work_dir) as work:
        for layers in depths:
            folder = work / str(layers)
            made = measured(__file__, "make_models", folder=str(folder), layers=layers, sizes=sizes)
            figures["layer_bytes"] = made["layer_bytes"]
            figures["teacher"][layers] = measured(__file__, "run_teacher", folder=str(folder))
            for target in ("output", "residual"):
                figures[f"refit_{target}"][layers] = measured(__file__, "run_refit", folder=str(folder), target=target)

    figures["growth"] = {run: _growth(figures[run], 0) for run in RUNS}
    figures["growth_above_import"] = {run: _growth(figures[run], figures["import_rss"]) for run in RUNS}
    report(
        "stream_memory",
        quick=options.quick,
        figures=figures,
        target=f"the peaks of teacher and refit grow at most {FLAT - 1:.0%} from {depths[0]} to {depths[-1]} layers",
        met=max(figures["growth"].values()) <= FLAT,
    )


def _growth(runs: dict[int, dict[str, Any]], imported: int) -> float:
    peaks = [runs[layers]["peak_rss"] - imported for layers in sorted(runs)]
    return max(peaks) / peaks[0]


def only_import() -> dict[str, Any]:
    import transformers.models.llama.modeling_llama

    import loram_hub.refitting
    import loram_hub.teaching  # noqa: F401

    assert transformers.models.llama.modeling_llama
    return {}


def make_models(folder: str, layers: int, sizes: dict[str, int]) -> dict[str, Any]:
    import torch
    from synthetic import layer_bytes, llama_config, write_checkpoint

    from loram_hub.pruning import prune

    config = llama_config(**sizes, num_hidden_layers=layers)
    base = Path(folder) / "base"
    write_checkpoint(base, config, dtype=torch.float32)
    _write_tokenizer(base, sizes["vocab_size"])
    _write_texts(Path(folder) / "texts.jsonl", sizes["vocab_size"])
    prune(base, Path(folder) / "release", pruning_ratio=0.6, importance="random")
    return {"layer_bytes": layer_bytes(config)}


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def _write_texts(path: Path, vocab_size: int) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(2 * SEQUENCES):
            text = " ".join(f"w{rng.randrange(3, vocab_size)}" for _ in range(TOKENS))
            file.write(json.dumps({"text": text}) + "\n")


def run_teacher(folder: str) -> dict[str, Any]:
    from loram_hub.corpora import Corpus
    from loram_hub.teaching import TeachingSettings, teach

    settings = TeachingSettings(sequences=SEQUENCES, sequence_length=TOKENS, held_out=0, block_sequences=SEQUENCES // 2)
    with stopwatch() as seconds:
        teach(
            f"{folder}/base",
            f"{folder}/teacher",
            corpora=[Corpus(source=f"{folder}/texts.jsonl")],
            settings=settings,
        )
    return {"seconds": seconds()}


def run_refit(folder: str, target: str) -> dict[str, Any]:
    import torch

    from loram_hub.refitting import RefitSettings, refit

    ids = torch.randint(3, 4096, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    with stopwatch() as seconds:
        refit(
            f"{folder}/release",
            f"{folder}/{target}",
            base=f"{folder}/base",
            calibration=ids,
            settings=RefitSettings(target=target),
        )
    return {"seconds": seconds()}


if __name__ == "__main__":
    serve_actions(only_import, make_models, run_teacher, run_refit)
    main()
