"""Throughput of an alignment step against a plain step of transformers' `Trainer` on the same shapes.

A random Llama (hidden 576, 9 query and 3 KV heads, 1,536 channels, 12 layers, vocabulary 16,384) is pruned to 0.65.
`align` (FSDP2 on one process, chunked loss, log as by default) and `Trainer` (its own loss over whole logits) train the
same weights in the same precision with fused AdamW and clipping on batches of the same shape. Runs alternate, each in a
process of its own; a run's figure is the median over its steps but the first three, the benchmark's the median over
runs.

    python benchmarks/align_step.py [--quick]
    python benchmarks/align_step.py --device cuda     # 1.5 B parameters in bf16; model-FLOP utilization as well

On CUDA, model FLOPs are 6 N per token, N without the embedding; the peak is that of the card's bf16 without sparsity,
given by --peak-tflops (H100 SXM: 989, by NVIDIA's data sheet).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

from measuring import measured, report, scratch_folder, serve_actions

SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_hidden_layers": 12,
    "vocab_size": 16_384,
}
CUDA_SIZES = SIZES | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 28,
    "vocab_size": 128_256,
}
QUICK_SIZES = SIZES | {
    "hidden_size": 36,
    "intermediate_size": 64,
    "head_dim": 4,
    "num_hidden_layers": 7,
    "vocab_size": 64,
}
SHAPE = {"batch_size": 8, "sequence_length": 256, "steps": 11}
CUDA_SHAPE = {"batch_size": 32, "sequence_length": 512, "steps": 23}
QUICK_SHAPE = {"batch_size": 2, "sequence_length": 16, "steps": 5}
ROUNDS, LEFT_OUT = 3, 3
TARGET = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of an alignment step against transformers' Trainer.")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that the script works, proves nothing")
    parser.add_argument("--work-dir", help="where to put the temporary checkpoints; default: the system's own")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="bf16 peak of the GPU")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    sizes, shape = (
        (QUICK_SIZES, QUICK_SHAPE) if options.quick else (CUDA_SIZES, CUDA_SHAPE) if on_gpu else (SIZES, SHAPE)
    )

    runs: dict[str, list[dict[str, Any]]] = {"align": [], "trainer": []}
    with scratch_folder("align-step", options.work_dir) as work:
        made = measured(__file__, "make_release", folder=str(work), sizes=sizes)
        for number in range(1 if options.quick else ROUNDS):
            given = {"folder": str(work), "shape": shape, "device": options.device}
            runs["align"].append(measured(__file__, "run_align", number=number, **given))
            runs["trainer"].append(measured(__file__, "run_trainer", **given))

    speed = {name: statistics.median(run["tokens_per_second"] for run in found) for name, found in runs.items()}
    figures: dict[str, Any] = {
        **made,
        "shape": shape,
        "device": options.device,
        "tokens_per_second": speed,
        "runs": {name: [run["tokens_per_second"] for run in found] for name, found in runs.items()},
        "peak_memory": {name: max(run["memory"] for run in found) for name, found in runs.items()},
        "ratio": speed["align"] / speed["trainer"],
    }
    if on_gpu:
        figures["model_flop_utilization"] = (
            6 * made["matrix_parameters"] * speed["align"] / (options.peak_tflops * 1e12)
        )
    met = figures["ratio"] >= TARGET
    report("align_step", quick=options.quick, figures=figures, target=f"at least {TARGET} of a Trainer step", met=met)


def make_release(folder: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Write a random base with a word tokenizer, prune it, and write a corpus of random words."""
    import random

    import torch
    from synthetic import llama_config, write_checkpoint
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from loram_hub import prune

    base = Path(folder) / "base"
    write_checkpoint(base, llama_config(**sizes), dtype=torch.float32)
    words = {f"w{number}": number for number in range(sizes["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(base)
    release = prune(base, Path(folder) / "release", pruning_ratio=0.65, importance="random")
    rng = random.Random(0)
    with (Path(folder) / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(2_000):
            text = " ".join(f"w{rng.randrange(3, sizes['vocab_size'])}" for _ in range(256))
            file.write(json.dumps({"text": text}) + "\n")
    parameters = release.manifest.parameters
    embedding = sizes["vocab_size"] * sizes["hidden_size"]
    return {"parameters": parameters, "matrix_parameters": parameters - embedding}


def run_align(folder: str, number: int, shape: dict[str, int], device: str) -> dict[str, Any]:
    """Align; the speed is the run's own log's."""
    from loram_hub.alignment import AlignmentSettings, align
    from loram_hub.corpora import Corpus

    out = Path(folder) / f"aligned-{number}"
    settings = AlignmentSettings(
        **shape, micro_batch_size=shape["batch_size"], warmup_steps=1, held_out=2, repeat=True,
        precision="bf16" if device == "cuda" else "fp32",
    )  # fmt: skip
    corpus = Corpus(source=str(Path(folder) / "corpus.jsonl"))
    align(Path(folder) / "release", out, corpora=[corpus], settings=settings, device=device)
    lines = (Path(folder) / f"aligned-{number}-run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "tokens_per_second" in record]
    speeds = [record["tokens_per_second"] for record in steps[LEFT_OUT:]]
    return {"tokens_per_second": statistics.median(speeds), "memory": steps[-1]["memory_bytes"]}


def run_trainer(folder: str, shape: dict[str, int], device: str) -> dict[str, Any]:
    """Train the same release with transformers' own loop."""
    import torch
    from measuring import peak_rss
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from loram_hub import AutoLoramModel

    logging.getLogger("transformers").setLevel(logging.ERROR)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoLoramModel.from_pretrained(Path(folder) / "release", dtype=dtype, device_map={"": device})
    generator = torch.Generator().manual_seed(0)
    count = shape["steps"] * shape["batch_size"]
    ids = torch.randint(3, model.config.vocab_size, (count, shape["sequence_length"]), generator=generator)

    class Rows(Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return count

        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            return {"input_ids": ids[row], "labels": ids[row]}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends = [time.perf_counter()]

        def on_step_end(self, *_: object, **__: object) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(Path(folder) / "trainer"), max_steps=shape["steps"], report_to="none", save_strategy="no",
        per_device_train_batch_size=shape["batch_size"], optim="adamw_torch_fused", learning_rate=5e-5,
        lr_scheduler_type="cosine", warmup_steps=1, logging_strategy="no", disable_tqdm=True, use_cpu=device == "cpu",
        dataloader_pin_memory=False, gradient_checkpointing=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[clock]).train()
    seconds = [later - earlier for earlier, later in zip(clock.ends, clock.ends[1:], strict=False)][LEFT_OUT:]
    tokens = shape["batch_size"] * shape["sequence_length"]
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss()
    return {"tokens_per_second": tokens / statistics.median(seconds), "memory": memory}


if __name__ == "__main__":
    serve_actions(make_release, run_align, run_trainer)
    main()
