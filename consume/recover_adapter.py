"""Recover a trained adapter to the size of the original model, and put it on the Hub if asked to.

    python recover_adapter.py outputs/checkpoint-400 my-adapter
    python recover_adapter.py trained my-adapter --release org/Llama-3.1-70B-LoRAM-0.85 --push me/Llama-3.1-70B-my-task

ADAPTER is what training saved with PEFT: a folder, a Trainer's checkpoint, or a Hub id. No GPU, no torch and no weights
are needed: of the release only its metadata is read.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from loram_hub import LoramError, push_adapter, recover


def main() -> None:
    """Recover, push if asked to, and print the command that serves the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="folder or Hub id of the trained adapter")
    parser.add_argument("out", help="folder to create")
    parser.add_argument("--release", help="that it was trained on; by default the one that the adapter names")
    parser.add_argument("--revision", help="of the release on the Hub")
    parser.add_argument("--push", metavar="REPO_ID", help="put it on the Hub under this id")
    options = parser.parse_args()

    recovered = recover(options.adapter, options.out, release=options.release, revision=options.revision)
    print(f"{len(recovered.modules)} modules of rank {recovered.rank}, {recovered.nbytes:,} bytes: {recovered.folder}")
    name = str(recovered.folder)
    if options.push is not None:
        pushed = push_adapter(recovered.folder, options.push)
        print(f"{pushed.url} at {pushed.commit}, {'private' if pushed.private else 'public'}")
        name = options.push
    base = [recovered.base_id, *(["--revision", recovered.revision] if recovered.revision else [])]
    lora = ["--enable-lora", "--max-lora-rank", str(recovered.max_lora_rank), "--lora-modules", f"tuned={name}"]
    print(shlex.join(["vllm", "serve", *base, *lora]))


if __name__ == "__main__":
    try:
        main()
    except LoramError as err:
        sys.exit(str(err))  # it says what is wrong and what to do
