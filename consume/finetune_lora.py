"""Train LoRA on a release with stock PEFT and TRL, and recover it: finetune_lora.py RELEASE TASKS.jsonl OUT."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from loram_hub import AutoLoramModel, recover

parser = argparse.ArgumentParser(description=__doc__)
for name in ("release", "tasks", "out"):  # tasks: records with `prompt` and `completion`, or with `text`
    parser.add_argument(name)
for name, default in (("--steps", 400), ("--batch", 4), ("--accumulation", 32), ("--tokens", 512)):
    parser.add_argument(name, type=int, default=default)  # 4 x 32 = 128 examples a step, as in the paper
given = parser.parse_args()

model = AutoLoramModel.from_pretrained(given.release, device_map="auto")  # every byte verified, then loaded
arguments = SFTConfig(
    output_dir=f"{given.out}-checkpoints", seed=0, max_length=given.tokens, report_to="none",
    max_steps=given.steps, per_device_train_batch_size=given.batch, gradient_accumulation_steps=given.accumulation,
    learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=0.05,
    optim="adamw_torch" if model.device.type == "cpu" else "paged_adamw_8bit",
    use_cpu=model.device.type == "cpu", bf16=model.dtype == torch.bfloat16,
)  # fmt: skip
trainer = SFTTrainer(
    model,
    args=arguments,
    train_dataset=load_dataset("json", data_files=given.tasks, split="train"),
    processing_class=AutoTokenizer.from_pretrained(model.loram.folder),
    peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
recovered = recover(trainer.model, given.out)  # full size, for the original model
pin = f" --revision {recovered.revision}" if recovered.revision else ""
lora = f"--enable-lora --max-lora-rank {recovered.max_lora_rank} --lora-modules tuned={recovered.folder}"
print(f"vllm serve {recovered.base_id}{pin} {lora}")
