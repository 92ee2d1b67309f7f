"""Fine-tune a tiny release again and again, killed at random instants and looked at after each change of a file.

Run as a script it imports everything once and forks a child for each run: `killed_finetuning.py FOLDER KILLS`. It
prints what it saw as one line of JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from killed import bytes_of
from tiny_finetuning import save_sparse_release, save_tiny_release, tiny_trainer

import loram_hub.cli.finetuning  # noqa: F401 (adds its command)
from loram_hub.adapter import MASKED_FIELD, RECORD
from loram_hub.cli import main as loram
from loram_hub.finetuning.callbacks import RecoverCallback, SealCallback
from loram_hub.finetuning.checkpoints import SEAL_FILE, latest_checkpoint
from loram_hub.finetuning.running import finetune
from loram_hub.finetuning.runs import Resume

_LATE = ("transformers.models.llama.modeling_llama", "transformers.integrations.bitsandbytes", "peft.tuners.lora.bnb")
_CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}
_STATE = ("adapter_model.safetensors", "loram.json", "optimizer.pt", "scheduler.pt")  # and those of random numbers
_MASKED_KILLS = 8
"""So many of the kills at random instants hit `finetune` as it trains masked LoRA."""
_EVERY = 16
"""Of the folders that kills at changes would leave, every so many is resumed from to the end."""


def train(release: Path, out: Path, watch: Callable[[], None] | None = None) -> None:
    """Train to the end, from wherever an earlier run in the folder was."""
    found = latest_checkpoint(out)
    if found is not None and found.has_stopped:
        return
    # The higher the loss, the "better": an early checkpoint stays the best and has to be kept to the end.
    trainer = tiny_trainer(
        release, out, [RecoverCallback(), SealCallback(keep=1)], eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    if watch is not None:
        watch()
    trainer.train(resume_from_checkpoint=found)  # type: ignore[arg-type]  # a path to `os.path`


def result(out: Path) -> dict[str, bytes]:
    """Return the state after the last step, and the recovered adapter of the best one."""
    found = latest_checkpoint(out)
    assert found is not None
    best = json.loads((found.folder / "trainer_state.json").read_text())["best_global_step"]
    return (
        state_of(found.folder)
        | bytes_of(out / f"recovered-{best}")
        | {"step": b"%d" % found.step, "best": b"%d" % best}
    )


def state_of(checkpoint: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint that decide how a run goes on."""
    return {name: (checkpoint / name).read_bytes() for name in _STATE} | {
        path.name: path.read_bytes() for path in sorted(checkpoint.glob("rng_state*"))
    }


def fork(action: Callable[[], object]) -> int:
    """Act in a child, which ends with 1 if that raises; returns its number."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int, is_time: Callable[[], bool] | None = None) -> tuple[int, float]:
    """Wait for a child, and return its exit code, negative for a signal, and the CPU time that it used in seconds.

    Args:
        child: its number.
        is_time: whether it is time to kill it; None for never.
    """
    found, status, used = os.wait4(child, 0 if is_time is None else os.WNOHANG)
    while not found:
        if is_time is not None and is_time():
            os.kill(child, signal.SIGKILL)  # nobody else has waited for it: the number is still its own
            is_time = None
        time.sleep(0.001)
        found, status, used = os.wait4(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def in_child(action: Callable[[], object], kill_after: float | None = None) -> tuple[bool, float]:
    """Act in a child; returns whether it was killed at work, and the CPU time that it used in seconds.

    Args:
        action: what it does.
        kill_after: CPU seconds after which it is killed, which do not depend on what else the machine does.
    """
    child = fork(action)
    code, seconds = ended(child, None if kill_after is None else lambda: cpu_seconds(child) >= kill_after)
    assert code in (0, -signal.SIGKILL), code
    return code != 0, seconds


def on_two_ranks(action: Callable[[], object], kill_when: Path | None = None) -> list[int]:
    """Act on two gloo ranks, and return their exit codes.

    Args:
        action: what each does.
        kill_when: the second is killed as soon as this is there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def act(rank: int) -> None:
        os.environ.update(address, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
        action()
        torch.distributed.destroy_process_group()

    first, second = (fork(lambda rank=rank: act(rank)) for rank in (0, 1))  # type: ignore[misc]
    killed, _ = ended(second, None if kill_when is None else kill_when.exists)
    code, _ = ended(first)
    return [code, killed]


def cpu_seconds(process: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def snapshots(out: Path, into: Path) -> Callable[[], None]:
    """Return what has this process copy a folder before each change of a file in it, as a kill would leave it."""
    is_copying = False

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal is_copying
        if is_copying or event not in _CHANGES or not str(arguments[0]).startswith(str(out)):
            return
        if event == "open" and str(arguments[1])[:1] not in "wax":
            return
        is_copying = True
        shutil.copytree(out, into / f"{len(os.listdir(into)):04d}" / out.name)
        is_copying = False

    into.mkdir()
    return lambda: sys.addaudithook(look)


def kill_at_random(
    folder: Path, act: Callable[[Path], object], result: Callable[[Path], dict[str, bytes]], kills: int
) -> tuple[int, int]:
    """Kill runs at random instants until so many kills have landed, and compare each run's end.

    Args:
        folder: for the runs.
        act: runs to the end, from wherever an earlier run in the folder was.
        result: reads what a run ended with.
        kills: how many.

    Returns:
        How many kills landed, and in how many runs.
    """
    _, seconds = in_child(partial(act, folder / "undisturbed"))
    expected, rng = result(folder / "undisturbed"), random.Random(0)
    landed = runs = 0
    while landed < kills:
        out, done = folder / f"killed-{runs}", False
        while not done:
            delay = rng.uniform(0.1, 0.9) * seconds if landed < kills else None
            was_killed, _ = in_child(partial(act, out), delay)
            landed, done = landed + was_killed, not was_killed
        assert result(out) == expected, out
        runs += 1
    return landed, runs


def kill_both(folder: Path, release: Path, kills: int) -> dict[str, int]:
    """Kill stock trainers on a structured release, and the command on a sparse one, with masked LoRA."""
    sparse = folder / "sparse"
    in_child(lambda: save_sparse_release(sparse))
    (folder / "masked").mkdir()
    masked = save_recipe(folder / "masked", sparse, rank=2, masked=True)
    trainers = kill_at_random(folder, partial(train, release), result, kills - _MASKED_KILLS)
    commands = kill_at_random(folder / "masked", partial(finetune, masked), adapters_of, _MASKED_KILLS)
    record = json.loads((folder / "masked" / "killed-0" / "recovered" / RECORD).read_text())
    assert record["trained"][MASKED_FIELD] is True
    return {
        "kills": trainers[0], "runs": trainers[1], "masked_kills": commands[0], "masked_runs": commands[1]
    }  # fmt: skip


def look_at_changes(folder: Path, release: Path) -> dict[str, Any]:
    """Look at what a kill before each change of a file would leave, and resume from some of it."""
    expected, watched = result(folder / "undisturbed"), folder / "watched" / "run"
    in_child(lambda: train(release, watched, snapshots(watched, folder / "states")))
    states = [path / watched.name for path in sorted((folder / "states").iterdir())]
    checkpoints = [path for state in states for path in state.glob("checkpoint-*") if (path / SEAL_FILE).exists()]
    known = {path.name: state_of(path) for path in checkpoints}  # each as it was last
    taken = set()
    for number, state in enumerate(states):
        found = latest_checkpoint(state)
        if found is not None:
            taken.add(found.step)
            assert state_of(found.folder) == known[found.folder.name]
        if number % _EVERY == 0:
            in_child(partial(train, release, state))
            assert result(state) == expected, state
    return {"states": len(states), "steps": sorted(taken)}


def look_at_the_command(folder: Path, release: Path) -> dict[str, Any]:
    """Kill `finetune` itself before changes of files, also where it replaces an earlier run; run each again."""
    asked, other = (save_recipe(folder, release, rank=rank) for rank in (2, 3))
    whole, watched = folder / "whole", folder / "command" / "run"
    earlier = folder / "earlier"
    in_child(lambda: finetune(asked, whole))
    in_child(lambda: finetune(other, earlier))
    expected, old = adapters_of(whole), adapters_of(earlier)
    in_child(partial(watch_command, asked, watched, folder / "begun", "auto"))
    shutil.copytree(earlier, folder / "anew" / "run")
    in_child(partial(watch_command, asked, folder / "anew" / "run", folder / "replaced", "never"))
    seen: set[tuple[str, ...]] = set()
    states = runs = 0
    for state in [*sorted((folder / "begun").iterdir()), *sorted((folder / "replaced").iterdir())]:
        states += 1
        out = state / "run"
        found = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else None
        of = expected if found is None or found["recipe"]["lora"]["r"] == 2 else old
        assert adapters_of(out).items() <= of.items(), state  # no adapter of the one under the name of the other
        phase = ("replaced" if of is old else "begun", *top_of(out))
        if phase in seen:
            continue
        seen.add(phase)
        runs += 1
        in_child(partial(finetune, asked, out, resume="never" if of is old else "auto"))
        assert adapters_of(out) == expected, state
    return {"command_states": states, "command_runs": runs}


def watch_command(recipe: Path, out: Path, into: Path, resume: Resume) -> None:
    """Run the command, and keep what a kill before each change would leave."""
    out.mkdir(parents=True, exist_ok=True)
    snapshots(out, into)()
    finetune(recipe, out, resume=resume)


def top_of(out: Path) -> list[str]:
    """Return what tells how far a run has come: its own files, and whether it has checkpoints."""
    found = {path.name for path in out.iterdir()}
    return sorted({name for name in found if "lock" not in name} | {"+" for _ in out.glob("checkpoints/checkpoint-*")})


def adapters_of(out: Path) -> dict[str, bytes]:
    """Return the weights of the adapters of a run that are there."""
    paths = (out / name / "adapter_model.safetensors" for name in ("adapter", "recovered"))
    return {path.parent.name: path.read_bytes() for path in paths if path.exists()}


def save_recipe(folder: Path, release: Path, *, rank: int, processes: int = 1, masked: bool | None = None) -> Path:
    """Write a recipe of two steps, with a checkpoint of each."""
    tasks = [{"prompt": f"w{n + 4} w{n + 9}", "completion": f" w{n + 5}"} for n in range(6)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    values = {
        "release": str(release), "dtype": "float32", "device": "cpu",
        "lora": {"r": rank, "masked": masked},
        "data": {"train": [{"source": "tasks.jsonl"}]}, "checkpoints": {"every": 1, "keep": 1, "recover": False},
        "training": {"steps": 2, "batch_size": 2 * processes, "micro_batch": 2, "max_tokens": 16},
        "distributed": {"processes": processes},
    }  # fmt: skip
    file = folder / f"rank-{rank}-in-{processes}.yaml"
    file.write_text(json.dumps(values))  # YAML takes JSON
    return file


def kill_one_of_two(folder: Path, release: Path) -> dict[str, Any]:
    """Kill one of two ranks halfway: the other ends too, and both resume."""
    out = folder / "one-killed"
    assert on_two_ranks(partial(train, release, folder / "two")) == [0, 0]
    codes = on_two_ranks(partial(train, release, out), kill_when=out / "checkpoint-2" / SEAL_FILE)
    found = latest_checkpoint(out)
    assert on_two_ranks(partial(train, release, out)) == [0, 0]
    assert result(out) == result(folder / "two")
    return {"two_ranks": codes, "two_resumed_from": None if found is None else found.step}


def fail_on_two_ranks(folder: Path, release: Path) -> dict[str, Any]:
    """Have the command fail on the first of two ranks, when the other has nothing to do, and return what both say."""
    recipe, out = save_recipe(folder, release, rank=2, processes=2), folder / "of-another"
    out.mkdir()
    (out / "run.json").write_text("{}")

    def command() -> None:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / f"{name}-{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY), descriptor)
        try:
            loram(["-q", "finetune", str(recipe), "--out", str(out), "--json"], prog_name="loram")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(int(end.code or 0))

    codes = on_two_ranks(command)
    said = {name: [(folder / f"{name}-{rank}").read_text() for rank in (0, 1)] for name in ("stdout", "stderr")}
    return {"failed": {"codes": codes, **said}}


def main(folder: Path, kills: int) -> None:
    """Run all of it."""
    for module in _LATE:
        importlib.import_module(module)
    gc.freeze()  # or each child would look through all that was imported
    assert len(os.listdir("/proc/self/task")) == 1, "a second thread: a fork could take a lock along"
    release = folder / "release"
    in_child(lambda: save_tiny_release(release))
    saw = kill_both(folder, release, kills) | look_at_changes(folder, release) | kill_one_of_two(folder, release)
    saw |= look_at_the_command(folder, release) | fail_on_two_ranks(folder, release)
    sys.stdout.write(json.dumps(saw) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
