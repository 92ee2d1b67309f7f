"""What stock libraries do with the altered releases and adapters of tests/trust, beside what `loram verify` says.

Each artefact is opened by the library that would open it, in a process of its own with a time limit:

    bf16, sharded, nf4    the base's own model_type is put back into config.json, the layers that are no longer of one size
                          keep it so (the class shrinks them to the plan of the sound release first), and transformers'
                          `from_pretrained` loads the folder; then one forward pass
    recovered, peft       PEFT's `from_pretrained` on the base model; then one forward pass

A stock class cannot hold layers of different sizes, so the comparison lends it the sound release's; everything that is
read from the altered files goes through the stock code. Alterations of what only loram-hub reads (manifest, mask indexes,
names of files that nobody opens) pass there unseen: stock libraries have nothing to compare them with.

Outcomes: `refused` with the type of the error; `runs` if logits equal those of the sound artefact; `runs, other numbers` if
they differ; `runs, NaN`; `hangs`; `crashes` with the signal.

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
        sound = {subject: _outcome(subject, subjects / subject, subjects) for subject in SUBJECTS}
        for subject, outcome in sound.items():
            if not outcome.get("logits"):
                raise SystemExit(f"stock_loaders.py: the sound {subject} does not load: {outcome}")

        def compare(number: int) -> tuple[str, int, str]:
            alteration = corpus[number]
            folder = Path(scratch) / str(number) / "altered"
            shutil.copytree(subjects / alteration.subject, folder)
            alteration.alter(folder)
            stock = _words(_outcome(alteration.subject, folder, subjects), sound[alteration.subject]["logits"])
            shutil.rmtree(folder.parent)
            return alteration.kind, alteration.exit_code, stock

        with ThreadPoolExecutor(WORKERS) as pool:
            rows = list(pool.map(compare, range(len(corpus))))
    _print_table(rows)


def _print_table(rows: list[tuple[str, int, str]]) -> None:
    print("| what was altered | `loram verify` | stock libraries |\n|---|---|---|")
    for kind, exit_code, stock in rows:
        print(f"| {kind} | refused, exit code {exit_code} | {stock} |")
    ran = sum(stock.startswith("runs") for _, _, stock in rows)
    print(f"\n{len(rows)} kinds: `loram verify` refused all, stock libraries ran {ran}.")


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
        model = (
            _load_adapter(folder, subjects)
            if subject in ("recovered", "peft")
            else _load_release(subject, folder, subjects)
        )
        with torch.no_grad():
            logits = model(input_ids=torch.arange(3, 15)[None]).logits[0, -1].float()
    # Whatever a library raises is what is asked for here.
    except BaseException as err:  # noqa: BLE001
        return {"error": type(err).__name__}
    return {"logits": [value if abs(value) < float("inf") else None for value in logits.tolist()]}


def _load_adapter(folder: Path, subjects: Path) -> Any:  # noqa: ANN401 (peft is imported late)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(subjects / "base"), folder)


def _load_release(subject: str, folder: Path, subjects: Path) -> Any:  # noqa: ANN401 (transformers is imported late)
    from transformers import AutoConfig

    from loram_hub.auto import _disable_cpu_repacking, _pruned_class
    from loram_hub.release import open_release

    config_file = folder / "config.json"
    if config_file.is_file():
        text = config_file.read_text(encoding="utf-8")
        config_file.write_text(text.replace('"loram_', '"', 1), encoding="utf-8")
    config = AutoConfig.from_pretrained(folder)
    model = _pruned_class(open_release(subjects / subject)).from_pretrained(folder, config=config)
    _disable_cpu_repacking(model)
    return model


if __name__ == "__main__":
    main()
