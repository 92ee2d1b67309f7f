"""What each memory option costs in quality: held-out loss of SmolLM2-135M, and of the adapters trained under it.

The model is that of `loram demo` (SmolLM2-135M-Instruct, from a wheel), in fp32 on the CPU. Its lm_head is its
embedding; here they are taken apart first, a copy each, so that an option can change one of them. The loss is on tasks
made of Python's standard library, signature -> first sentence of the docstring, from modules that training never saw.

1. `base`: the loss of the base model, with its embedding or lm_head changed. No training.
2. `recovered`: LoRA is trained on a pruned NF4 release of the base under each option, with the same tasks in the same
   order from the same start, and recovered; then the loss of the *unchanged* base with that adapter. Two seeds.

An embedding in main memory and a loss in pieces change no value (tests/test_lowmemory.py), so they have no row.

    python benchmarks/memory_options.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import report, scratch_folder, stopwatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loram_hub.lowmemory import MemoryOptions
    from loram_hub.texts import Example

FORWARD = {
    "16 bit": ("device", "device"),
    "embedding int8": ("int8", "device"),
    "lm_head int8": ("device", "int8"),
    "lm_head nf4": ("device", "nf4"),
    "embedding int8, lm_head int8": ("int8", "int8"),
    "embedding int8, lm_head nf4": ("int8", "nf4"),
}
TRAINED = ("16 bit", "embedding int8, lm_head int8", "embedding int8, lm_head nf4")
HELD_OUT, STEPS, BATCH, SEEDS = 64, 24, 8, (0, 1)
RATIO = 0.5
MOST_LOST = 0.02
"""Most that the loss of the base with a recovered adapter may rise, in nats per token, as a mean over the seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality cost of the memory options.")
    parser.add_argument("--quick", action="store_true", help="two tasks, one step: shows that it works, proves nothing")
    parser.add_argument("--work-dir", help="where to put the temporary release and adapters; default: the system's own")
    options = parser.parse_args()
    held_out, steps, seeds = (2, 1, SEEDS[:1]) if options.quick else (HELD_OUT, STEPS, SEEDS)

    with scratch_folder("memory-options", options.work_dir) as work, stopwatch() as seconds:
        figures = _measure(work, held_out=held_out, steps=steps, seeds=seeds)
    plain = figures["recovered"]["16 bit"]
    lost = {
        name: statistics.mean(loss - before for loss, before in zip(losses, plain, strict=True))
        for name, losses in figures["recovered"].items()
    }
    report(
        "memory_options",
        quick=options.quick,
        figures={**figures, "recovered_minus_16_bit": lost, "seconds": seconds()},
        target=f"training under the options costs at most {MOST_LOST} nats per token on the base with the adapter",
        met=max(lost.values()) <= MOST_LOST,
    )


def _measure(work: Path, *, held_out: int, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    import random

    from transformers import AutoTokenizer

    from loram_hub import prune
    from loram_hub.demo.base_model import base_model
    from loram_hub.demo.corpus import stdlib_examples, stdlib_texts
    from loram_hub.texts import calibration_ids

    base = base_model()
    tokenizer = AutoTokenizer.from_pretrained(base)
    training, scored = stdlib_examples()
    for tasks in (training, scored):
        random.Random(0).shuffle(tasks)
    scored = scored[:held_out]
    calibration = calibration_ids(stdlib_texts(), tokenizer, samples=8, tokens=64, seed=0)
    prune(base, work / "release", pruning_ratio=RATIO, calibration=calibration, seed=0, quantize=True)
    recovered: dict[str, list[float]] = {name: [] for name in TRAINED}
    for seed in seeds:
        tasks = random.Random(seed).sample(training, steps * BATCH)
        for name in TRAINED:
            adapter = _train(work, tokenizer, tasks, _options(name), seed=seed)
            recovered[name].append(_loss(base, tokenizer, scored, _options("16 bit"), adapter=adapter))
    return {
        "held_out": held_out,
        "steps": steps,
        "batch": BATCH,
        "seeds": list(seeds),
        "base": {name: _loss(base, tokenizer, scored, _options(name)) for name in FORWARD},
        "recovered": recovered,
    }


def _options(name: str) -> MemoryOptions:
    from loram_hub.lowmemory import MemoryOptions

    embedding, lm_head = FORWARD[name]
    return MemoryOptions(embedding=embedding, lm_head=lm_head)


def _untied(model: PreTrainedModel) -> PreTrainedModel:
    """Give the lm_head a copy of the embedding for its own."""
    import torch

    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    return model


def _loss(
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Example],
    options: MemoryOptions,
    *,
    adapter: Path | None = None,
) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from loram_hub.evaluation import encode_examples, held_out_loss
    from loram_hub.lowmemory import reduce_memory_

    model = _untied(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    reduce_memory_(model, options)
    changed = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    encoded, _ = encode_examples(tasks, tokenizer, max_tokens=256)
    return held_out_loss(changed, encoded).loss


def _train(
    work: Path, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Example], options: MemoryOptions, *, seed: int
) -> Path:
    """Train LoRA on the release under the options; return the recovered adapter."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from loram_hub import AutoLoramModel, recover
    from loram_hub.lowmemory import reduce_memory_

    set_seed(seed)
    model = _untied(AutoLoramModel.from_pretrained(work / "release", dtype=torch.float32))
    reduce_memory_(model, options)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(work / "trainer"),
            max_steps=len(tasks) // BATCH,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            max_length=256,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_list([asdict(task) for task in tasks]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, where the line of JSON goes
    trainer.train()
    trainer.save_model(str(work / "adapter"))
    return recover(work / "adapter", work / "recovered", release=work / "release", overwrite=True).folder


if __name__ == "__main__":
    main()
