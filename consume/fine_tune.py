"""Fine-tune a release on a small GPU, recover the adapter to full size, and put it on the Hub.

    python fine_tune.py org/Llama-3.1-70B-LoRAM-0.85 tasks.jsonl me/Llama-3.1-70B-my-task

`tasks.jsonl` holds records with `prompt` and `completion`, or with `text`. Copy this file and change what you need: it
is TRL and PEFT as they are, but for the lines marked (1) to (3).
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from loram_hub import AutoLoramModel, push_adapter, recover

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Parse the command line, train, recover, push."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", help="Hub id or folder of the release")
    parser.add_argument("tasks", help="JSON lines")
    parser.add_argument("repo_id", help="where the adapter goes on the Hub")
    parser.add_argument("--out", default="recovered-adapter", help="folder of the recovered adapter")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=32, help="batches per step: 4 x 32 = 128, as in the paper")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--device-map", default="auto", help="'auto', 'cuda:0' or 'cpu'")
    options = parser.parse_args()

    model = AutoLoramModel.from_pretrained(options.release, device_map=options.device_map)  # (1) verified, then loaded
    on_cpu = model.device.type == "cpu"
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir="checkpoints",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            max_length=options.max_tokens,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            optim="adamw_torch" if on_cpu else "paged_adamw_8bit",
            use_cpu=on_cpu,
            bf16=not on_cpu,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.tasks, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model.loram.folder),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.05, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    recovered = recover(trainer.model, options.out, overwrite=True)  # (2) full size, for the original model
    pushed = push_adapter(recovered.folder, options.repo_id)  # (3) verified again on the Hub, then shown
    print(f"{pushed.url} at {pushed.commit}, {'private' if pushed.private else 'public'}. To serve it:")
    lora = f"--enable-lora --max-lora-rank {recovered.max_lora_rank} --lora-modules tuned={options.repo_id}"
    print(f"vllm serve {recovered.base_id} {lora}")


if __name__ == "__main__":
    main()
