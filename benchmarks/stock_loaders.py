"""What stock libraries do with the altered releases and adapters of tests/trust, beside what `loram verify` says.

Each artefact is opened by the library that would open it, in a process of its own with a limit on time and memory:

    bf16, sharded, nf4    transformers' AutoModelForCausalLM, once config.json has the base's own model_type back and
                          says the pruned sizes, which are the same in every layer here; then one forward pass
    recovered, peft       PEFT's `from_pretrained` on the base model; then one forward pass

Manifest, mask indexes and files that nobody opens mean nothing to them, so what is altered there passes unseen.

Outcomes: `refused` with the type of the error; `runs` if logits equal those of the sound artefact; `runs, other
numbers` if they differ; `runs, NaN`; `hangs`; `crashes` with the signal.

    python benchmarks/stock_loaders.py [--quick] > table.md
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SECONDS = 120
MEMORY = 6 * 2**30
QUICK = ("code added", "a bit of the weights flipped", "auto_map", "NF4: block size 1", "adapter: NaN in a factor")
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description="What stock libraries do with altered files.")
    parser.add_argument("--quick", action="store_true", help="a handful of kinds: shows that the script works")
    parser.add_argument("--open", nargs=3, metavar=("SUBJECT", "FOLDER", "SUBJECTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(open_stock(options.open[0], Path(options.open[1]), Path(options.open[2]))))
        return

    from trust.adapter_corpus import ADAPTERS
    from trust.corpus import RELEASES
    from trust.subjects import SUBJECTS, build_subjects

    corpus = [each for each in (*RELEASES, *ADAPTERS) if not options.quick or each.kind in QUICK]
    with tempfile.TemporaryDirectory(prefix="loram-stock-") as scratch:
        subjects = Path(scratch) / "subjects"
        build_subjects(subjects)
        shutil.copytree(subjects, Path(scratch) / "sound")
        sound = {subject: _outcome(subject, Path(scratch) / "sound" / subject, subjects) for subject in SUBJECTS}
        for subject, outcome in sound.items():
            if not outcome.get("logits"):
                raise SystemExit(f"stock_loaders.py: the sound {subject} does not load: {outcome}")

        def compare(number: int) -> tuple[str, str, str]:
            alteration = corpus[number]
            folder = Path(scratch) / str(number) / "altered"
            shutil.copytree(subjects / alteration.subject, folder)
            alteration.alter(folder)
            ours = _verified(folder, subjects / "base" if alteration in ADAPTERS else None)
            stock = _words(_outcome(alteration.subject, folder, subjects), sound[alteration.subject]["logits"])
            shutil.rmtree(folder.parent)
            return alteration.kind, ours, stock

        with ThreadPoolExecutor(WORKERS) as pool:
            rows = list(pool.map(compare, range(len(corpus))))
    _print_table(rows)


def _verified(folder: Path, base: Path | None) -> str:
    from loram_hub.errors import LoramError
    from loram_hub.inspection import verify

    try:
        verify(folder, base=base)
    except LoramError as err:
        return f"refused, exit code {err.exit_code}"
    return "passes"


def _print_table(rows: list[tuple[str, str, str]]) -> None:
    print("| what was altered | `loram verify` | stock libraries |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    refused, ran = (sum(row[column].startswith(word) for row in rows) for column, word in ((1, "refused"), (2, "runs")))
    print(f"\n{len(rows)} kinds: `loram verify` refused {refused}, stock libraries ran {ran}.")


def _outcome(subject: str, folder: Path, subjects: Path) -> dict[str, Any]:
    """Open an artefact in a process of its own; whatever becomes of that is the outcome."""
    command = [sys.executable, __file__, "--open", subject, str(folder), str(subjects)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return {"hangs": SECONDS}
    if done.returncode < 0:
        return {"signal": signal.Signals(-done.returncode).name}
    if done.returncode > 0:
        return {"error": f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _words(outcome: dict[str, Any], sound: list[float]) -> str:
    if "hangs" in outcome:
        return f"hangs (over {SECONDS} s)"
    if "signal" in outcome:
        return f"crashes ({outcome['signal']})"
    if "error" in outcome:
        return f"refused: {outcome['error']}"
    logits = outcome["logits"]
    if any(value is None for value in logits):
        return "runs, NaN"
    return "runs" if logits == sound else "runs, other numbers"


def open_stock(subject: str, folder: Path, subjects: Path) -> dict[str, Any]:
    """Open an artefact with the stock library and run one forward pass; the error's type if that is refused."""
    import resource

    import torch

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.manual_seed(0)
    try:
        model = _load_adapter(folder, subjects) if subject in ("recovered", "peft") else _load_release(folder, subjects)
        model.train()  # without dropout; in eval mode bitsandbytes 0.50 repacks NF4 first, and fails for odd sizes
        with torch.no_grad():
            logits = model(input_ids=torch.arange(3, 15)[None]).logits[0, -1].float()
    # Whatever a library raises, and a `SystemExit` too, is what is asked for here.
    except BaseException as err:
        return {"error": type(err).__name__}
    return {"logits": [value if abs(value) < float("inf") else None for value in logits.tolist()]}


def _load_adapter(folder: Path, subjects: Path) -> Any:  # noqa: ANN401 (peft is imported late)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(subjects / "base"), folder)


def _load_release(folder: Path, subjects: Path) -> Any:  # noqa: ANN401 (transformers is imported late)
    from transformers import AutoModelForCausalLM

    config = folder / "config.json"
    if config.is_file():
        config.write_text(_stock_config(config.read_text(encoding="utf-8"), subjects), encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(folder)


def _stock_config(text: str, subjects: Path) -> str:
    """Put the base's model_type back and the pruned sizes in, where the alteration did not touch them."""
    from loram_hub.release import open_metadata

    plan = open_metadata(subjects / "bf16").plan
    (sizes,) = set(plan.layers)
    whole = plan.architecture
    pruned = {
        "intermediate_size": (whole.intermediate_size, sizes.channels),
        "num_key_value_heads": (whole.num_key_value_heads, sizes.kv_heads),
        "num_attention_heads": (
            whole.num_attention_heads,
            sizes.kv_heads * whole.num_attention_heads // whole.num_key_value_heads,
        ),
    }
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key, (before, after) in pruned.items():
        if values.get(key) == before:
            values[key] = after
    if isinstance(values.get("model_type"), str):
        values["model_type"] = values["model_type"].removeprefix("loram_")
    return json.dumps(values)


if __name__ == "__main__":
    main()
