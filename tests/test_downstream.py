"""Run with: pytest tests/test_downstream.py"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import SEVEN, save_base, save_tokenizer, tiny_config
from click.testing import CliRunner, Result
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram_hub.auto import AutoLoramModel
from loram_hub.cards import make_card
from loram_hub.cli import main
from loram_hub.downstream import (
    PRESETS,
    Limits,
    TaskResults,
    evaluate_tasks,
    pass_at_k,
    preview_tasks,
    programs,
    run_program,
)
from loram_hub.downstream.backends import Wrapped, visit_models, vllm_arguments
from loram_hub.downstream.catalogue import task_manager
from loram_hub.downstream.loading import _overlay
from loram_hub.errors import AccessError, InvalidRequestError, MissingDependencyError, ResourceError
from loram_hub.evaluation import MODELS, evaluate, find_subjects, placement
from loram_hub.pruning import prune
from loram_hub.recovery import recover


def _questions() -> list[dict[str, Any]]:
    """Draw questions of 1 to 4 words with 2 to 4 answers of 1 to 3 words, any of which may be right."""
    rng = random.Random(0)

    def words(most: int) -> str:
        return " ".join(f"w{rng.randrange(4, 53)}" for _ in range(rng.randint(1, most)))

    drawn = ((words(4), [words(3) for _ in range(rng.randint(2, 4))]) for _ in range(24))
    return [{"question": asked, "choices": said, "answer": rng.randrange(len(said))} for asked, said in drawn]


QUESTIONS = _questions()
SHOT = {"question": "w40 w41", "choices": ["w42", "w43"], "answer": 1}
TASK: dict[str, Any] = {
    "task": "tiny_choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "test.jsonl", "train": "train.jsonl"}},
    "output_type": "multiple_choice",
    "training_split": "train",
    "test_split": "test",
    "fewshot_config": {"sampler": "first_n", "split": "train"},
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "num_fewshot": 0,
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 3},
}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
DONE = "\n\ndef check(f):\n    assert f(2) == 3\n"


def write_task(folder: Path, task: dict[str, Any], **splits: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a release of it, an adapter trained (well, drawn) on the release, and the recovered one."""
    root = tmp_path_factory.mktemp("downstream")
    base = save_tokenizer(save_base(root / "base", tiny_config(layers=3)))
    release = prune(base, root / "release", pruning_ratio=0.5, importance="magnitude", keep_first=1, keep_last=1).folder
    torch.manual_seed(0)
    model = get_peft_model(
        AutoLoramModel.from_pretrained(release, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=64, target_modules=list(SEVEN), init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(str(root / "adapter"))
    recovered = recover(root / "adapter", root / "recovered", release=release, dtype="float32").folder
    return {"base": base, "release": release, "adapter": root / "adapter", "recovered": recovered}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("tasks") / "choice", TASK, test=QUESTIONS, train=[SHOT])


def opened(models: dict[str, Path], name: str) -> Any:
    """Open a model without any of the code under test but `AutoLoramModel`."""
    if name.startswith("pruned"):
        model: Any = AutoLoramModel.from_pretrained(models["release"], dtype=torch.float32)
        return PeftModel.from_pretrained(model, models["adapter"]) if "adapter" in name else model
    model = AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float32)
    return PeftModel.from_pretrained(model, models["recovered"]) if "adapter" in name else model


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    prompt, ids = tokenizer(context)["input_ids"], tokenizer(f"{context} {continuation}")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[place - 1, ids[place]].item() for place in range(len(prompt), len(ids)))


def accuracies(model: Any, tokenizer: Any, *, before: str = "") -> tuple[float, float]:
    """The share of questions whose right answer is likeliest: as it is, and per character."""
    right, right_per_character = 0, 0
    for row in QUESTIONS:
        scores = [log_likelihood(model, tokenizer, before + row["question"], choice) for choice in row["choices"]]
        lengths = [len(choice) for choice in row["choices"]]
        right += max(range(len(scores)), key=scores.__getitem__) == row["answer"]
        shares = [score / length for score, length in zip(scores, lengths, strict=True)]
        right_per_character += max(range(len(shares)), key=shares.__getitem__) == row["answer"]
    return right / len(QUESTIONS), right_per_character / len(QUESTIONS)


# What is measured.


@pytest.fixture(scope="module")
def results(models: dict[str, Path], tasks: Path) -> TaskResults:
    return evaluate_tasks("tiny_choice", **models, include_path=tasks, dtype=torch.float32, batch_size=3)


def test_the_accuracy_of_each_model_is_the_one_computed_by_hand(models: dict[str, Path], results: TaskResults) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    values = {(score.model, score.metric): score.value for score in results.scores}

    expected = {name: accuracies(opened(models, name), tokenizer) for name in MODELS}

    assert {name: (values[name, "acc"], values[name, "acc_norm"]) for name in MODELS} == {
        name: pytest.approx(found) for name, found in expected.items()
    }
    assert len(set(expected.values())) > 2, "models that all do the same prove nothing"
    assert results.value_of("base", "tiny_choice") == values["base", "acc"]


def test_the_standard_error_is_that_of_a_mean(results: TaskResults) -> None:
    score = next(score for score in results.scores if score.stderr and score.metric == "acc")
    share, count = score.value, len(QUESTIONS)

    assert score.stderr == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))


def test_log_likelihoods_of_the_harness_are_those_of_plain_torch(models: dict[str, Path]) -> None:
    from lm_eval.api.instance import Instance

    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    pairs = [(row["question"], f" {choice}") for row in QUESTIONS for choice in row["choices"]]
    found: dict[str, list[float]] = {}

    def ask(wrapped: Wrapped) -> None:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=place)
            for place, pair in enumerate(pairs)
        ]
        found[wrapped.model] = [value for value, _ in wrapped.lm.loglikelihood(requests, disable_tqdm=True)]

    plain = {name: opened(models, name) for name in MODELS}
    expected = {
        name: [log_likelihood(model, tokenizer, context, choice.strip()) for context, choice in pairs]
        for name, model in plain.items()
    }
    for as_ in ("adapter", "merged"):
        subjects = find_subjects(**models, allow_base_mismatch=False)
        visit_models(ask, subjects, placement(None, torch.float32), as_=as_, batch_size=4, seed=0, mismatch=False)
        for name in MODELS:
            assert found[name] == pytest.approx(expected[name], abs=2e-4), (as_, name)
    assert found["base"] != pytest.approx(found["base + recovered adapter"], abs=0.01)


def test_shots_stand_in_front_of_the_question(models: dict[str, Path], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "shots", {**TASK, "num_fewshot": None}, test=QUESTIONS, train=[SHOT])
    tokenizer = AutoTokenizer.from_pretrained(models["base"])

    options: dict[str, Any] = {"base": models["base"], "include_path": folder, "dtype": torch.float32}
    measured = evaluate_tasks("tiny_choice", num_fewshot=1, **options)
    limited = evaluate_tasks(["tiny_choice"], limit=2, **options)

    model = opened(models, "base")
    assert measured.value_of("base", "tiny_choice") == accuracies(model, tokenizer, before="w40 w41 w43\n\n")[0]
    assert measured.tasks[0].num_fewshot == 1
    assert (limited.tasks[0].num_fewshot, limited.tasks[0].samples, limited.tasks[0].documents) == (0, 2, 24)
    assert limited.tasks[0].prompts_sha256 != measured.tasks[0].prompts_sha256


def test_the_results_say_everything_that_is_needed_to_repeat_them(
    models: dict[str, Path], results: TaskResults
) -> None:
    values = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    parts = {part["part"]: part for part in values["provenance"]["parts"]}

    assert [model["model"] for model in values["models"]] == list(MODELS)
    for part, names in {
        "base": ("config.json", "model.safetensors"),
        "release": ("loram.json",),
        "adapter": ("adapter_config.json", "adapter_model.safetensors"),
        "recovered": ("adapter_config.json", "adapter_model.safetensors"),
    }.items():
        names += tuple(TOKENIZER & {file.name for file in models[part].iterdir()}) if part == "base" else ()
        hashes = {name: hashlib.sha256((models[part] / name).read_bytes()).hexdigest() for name in names}
        assert parts[part]["files"] == hashes
    assert parts["base"]["files"].keys() & TOKENIZER, "the tokenizer decides what is asked"
    assert values["provenance"]["settings"]["allow_base_mismatch"] is False
    assert parts["release"]["plan_sha256"] == AutoLoramModel.from_pretrained(models["release"]).loram.plan.digest
    assert set(values["provenance"]["versions"]) >= {"python", "torch", "transformers", "peft", "lm-eval"}
    settings = values["provenance"]["settings"]
    assert (settings["seed"], settings["dtype"], settings["device"], settings["as"]) == (
        1234,
        "float32",
        "cpu",
        "adapter",
    )
    assert list(settings["task_files"]) == ["tiny_choice"], "a task that is not the harness's is named by its hash"
    assert values["tasks"][0]["version"] == "3"
    assert str(models["base"].parent) not in json.dumps(values), "no path leaves this machine"
    sizes = {model["model"]: model["parameters"] for model in values["models"]}
    assert sizes["base"] == sum(weight.numel() for weight in opened(models, "base").parameters())
    assert sizes["pruned"] == AutoLoramModel.from_pretrained(models["release"]).loram.manifest.parameters


def test_the_mean_of_commonsense_tasks_is_that_of_their_accuracies_and_own_files_win(
    models: dict[str, Path], tmp_path: Path
) -> None:
    names = [request.task for request in PRESETS["csr"]]
    for place, name in enumerate(names):
        changes = {"task": name, "num_fewshot": None}
        write_task(tmp_path / "own" / name, TASK | changes, test=QUESTIONS[place : place + 9], train=[SHOT])
    group = {"group": "both", "task": names[:2], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "own" / "group.yaml").write_text(yaml.safe_dump(group))

    measured = evaluate_tasks("csr", base=models["base"], include_path=tmp_path / "own", dtype=torch.float32)
    grouped = evaluate_tasks(
        "both", base=models["base"], include_path=tmp_path / "own", num_fewshot=1, dtype=torch.float32
    )

    single = {name: measured.value_of("base", name) or 0.0 for name in names}
    assert [task.num_fewshot for task in measured.tasks] == [1] * 6
    assert {task.dataset for task in measured.tasks} == {None}
    assert measured.value_of("base", "mean of csr") == pytest.approx(sum(single.values()) / 6)
    assert len(set(single.values())) > 1
    assert grouped.value_of("base", "both") == pytest.approx(sum(single[name] for name in names[:2]) / 2)
    assert grouped.value_of("base", "mean of csr") is None


# Presets and what tasks need.


def test_every_task_of_a_preset_is_one_of_the_harness_with_data_on_the_hub() -> None:
    planned = {task.name: task for task in preview_tasks("paper")}

    assert set(planned) == {request.task for request in PRESETS["paper"]}
    assert {request.task for name in ("math", "csr", "code") for request in PRESETS[name]} == set(planned)
    assert all(task.dataset and task.place == "missing" for task in planned.values())
    assert [name for name, task in planned.items() if task.runs_code] == ["humaneval"]
    shots = {name: task.request.num_fewshot for name, task in planned.items()}
    assert shots == {
        "mathqa": 1, "gsm8k_cot": 8, "arc_challenge": 1, "arc_easy": 1, "hellaswag": 1, "openbookqa": 1, "piqa": 1,
        "winogrande": 1, "humaneval": 0,
    }  # fmt: skip


def test_the_metrics_of_a_preset_are_those_of_its_tasks() -> None:
    for request in PRESETS["paper"]:
        config = task_manager([request.task], []).task_index[request.task].cfg
        filters = {named["name"] for named in config.get("filter_list", [])} or {"none"}
        if config.get("unsafe_code"):
            continue  # judged here, not by the harness
        assert request.metric in {named["metric"] for named in config["metric_list"]}
        assert request.filter in filters


def test_offline_it_says_what_to_download_before_it_looks_at_any_model() -> None:
    with pytest.raises(AccessError) as caught:
        evaluate_tasks("mathqa,arc_easy", base="org/there-is-no-such-model")

    assert "hf download --repo-type dataset regisss/math_qa" in str(caught.value)
    assert "hf download --repo-type dataset allenai/ai2_arc" in str(caught.value)
    assert caught.value.exit_code == 5


def test_what_hf_download_has_fetched_is_enough_offline(models: dict[str, Path], tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = Path(constants.HF_HUB_CACHE) / "datasets--org--tiny-questions"
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    (snapshot / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    remote = {key: value for key, value in TASK.items() if key not in ("training_split", "fewshot_config")}
    remote |= {"task": "remote_choice", "dataset_path": "org/tiny-questions", "dataset_kwargs": {}}

    measured = evaluate_tasks(
        "remote_choice",
        base=models["base"],
        include_path=write_task(tmp_path / "remote", remote),
        dtype=torch.float32,
    )

    (task,) = measured.tasks
    assert (task.dataset, task.dataset_revision, task.samples) == ("org/tiny-questions", commit, len(QUESTIONS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "reads gone.jsonl, which is neither here nor in"),
        ({"doc_to_text": "{{no_such_column.inner}}"}, "cannot load tiny_choice: .*Check the task file"),
        ({"test_split": "validation"}, "cannot load tiny_choice: KeyError"),
    ],
)
def test_a_task_file_that_is_wrong_gets_one_line(
    models: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = write_task(tmp_path / "wrong", TASK | change, test=QUESTIONS, train=[SHOT])

    with pytest.raises(InvalidRequestError, match=message):
        evaluate_tasks("tiny_choice", base=models["base"], include_path=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": " , "}, "No task was named"),
        ({"tasks": "tiny_choice", "limit": 0}, "limit 0"),
        ({"tasks": "tiny_choice", "num_fewshot": -1}, "num_fewshot is -1"),
        ({"tasks": "tiny_choice", "as_": "gguf"}, "one of adapter, merged, vllm"),
        ({"tasks": "tiny_choice", "include_path": "no/such/folder"}, "is no folder"),
    ],
)
def test_arguments_outside_their_domain_are_refused(
    models: dict[str, Path], tasks: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        evaluate_tasks(**{"include_path": tasks, "base": models["base"], **options})


# vLLM, which is not here: what it would be called with, and who is turned away.


def test_vllm_gets_the_base_and_the_adapter_by_arguments_that_the_harness_has(models: dict[str, Path]) -> None:
    import lm_eval.models

    subjects = find_subjects(
        base=models["base"], release=None, adapter=None, recovered=models["recovered"], allow_base_mismatch=False
    )

    arguments = vllm_arguments(subjects, placement(None, torch.bfloat16), batch_size=4, seed=7)

    source = Path(lm_eval.models.__file__).with_name("vllm_causallms.py").read_text(encoding="utf-8")
    backend = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "VLLM")
    init = next(node for node in backend.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert set(arguments) <= {argument.arg for argument in init.args.args}
    assert arguments["lora_local_path"] == str(models["recovered"])
    assert (arguments["pretrained"], arguments["dtype"]) == (str(models["base"]), "bfloat16")
    assert arguments["max_lora_rank"] == 8, "the smallest that vLLM knows and that holds rank 4"


def test_vllm_is_refused_for_a_release_and_where_it_is_not_installed(models: dict[str, Path], tasks: Path) -> None:
    with pytest.raises(InvalidRequestError, match="vLLM opens no release"):
        evaluate_tasks("tiny_choice", release=models["release"], as_="vllm", include_path=tasks)
    if "vllm" not in sys.modules:
        with pytest.raises(MissingDependencyError, match="pip install vllm"):
            evaluate_tasks("tiny_choice", base=models["base"], as_="vllm", include_path=tasks)


# Generated programs.

PROGRAMS = {
    "right": ("def f(x):\n    return x + 1", True),
    "right, with a file of its own": ("def f(x):\n    open('a', 'w').write('b')\n    return x + 1", True),
    "wrong": ("def f(x):\n    return x", False),
    "no Python": ("def f(x) return", False),
    "endless": ("def f(x):\n    while True:\n        pass", False),
    "asleep": ("import time\ndef f(x):\n    time.sleep(600)", False),
    "a memory hog": ("def f(x):\n    return len(bytearray(2 ** 34)) and 3", False),
    "a fork bomb": ("import os\ndef f(x):\n    while True:\n        os.fork()", False),
    "a starter of processes": ("import subprocess\ndef f(x):\n    subprocess.run(['true'])\n    return 3", False),
    "a caller": ("import socket\ndef f(x):\n    socket.socket().connect(('127.0.0.1', 9))\n    return 3", False),
    "a liar": ("print('passed')\nraise SystemExit(0)", False),
    "a quick liar": ("import os\nos._exit(0)", False),
    "a writer of garbage": (
        "import os\nfor place in range(3, 32):\n    try:\n        os.write(place, b'passed')\n    except OSError:\n"
        "        pass\ndef f(x):\n    return 3",
        False,
    ),
    "a filler of disks": ("def f(x):\n    open('a', 'w').write('b' * 2 ** 24)\n    return 3", False),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_passes_only_if_its_tests_ran_to_the_end(kind: str) -> None:
    program, passes = PROGRAMS[kind]
    limits = Limits(cpu_seconds=1, wall_seconds=2 if kind == "asleep" else 20, memory_bytes=2**29)

    assert run_program(program, f"{DONE}\ncheck(f)", limits=limits).passed == passes


def test_a_program_writes_nothing_outside_its_folder(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("kept")
    lines = [
        f"open({str(mine)!r}, 'w')", f"open({str(tmp_path / 'new')!r}, 'x')", f"os.remove({str(mine)!r})",
        f"os.rename({str(mine)!r}, 'here')", f"shutil.rmtree({str(tmp_path)!r})", f"os.chmod({str(mine)!r}, 0)",
        f"pathlib.Path({str(tmp_path)!r}, 'new').mkdir()", f"os.symlink({str(mine)!r}, 'link')",
    ]  # fmt: skip

    for line in lines:
        program = f"import os, pathlib, shutil\ntry:\n    {line}\nexcept PermissionError:\n    f = lambda x: x + 1"
        assert run_program(program, f"{DONE}\ncheck(f)").passed, line

    assert mine.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


TRICKS = {
    "a file by a folder's descriptor": (
        "d = os.open(OUT, 0); os.write(os.open('x', os.O_CREAT | os.O_RDWR, dir_fd=d), b'x')"
    ),
    "a file from another folder": "os.chdir(OUT); open('x', 'w')",
    "a file by a name that changes": (
        "class Name(str):\n    def split(self, *a): return []\n    def startswith(self, *a): return False\n"
        "open(Name(OUT + '/x'), 'w')"
    ),
    "a file by a detour": "open('../' * 9 + OUT + '/x', 'w')",
    "the history of readline": "import readline; readline.add_history('x'); readline.write_history_file(OUT + '/x')",
    "the key log of ssl": "import ssl; ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).keylog_filename = OUT + '/x'",
    "a database": "import _dbm; _dbm.open(OUT + '/x', 'c', 0o666).close()",
    "a named pipe": "os.mkfifo(OUT + '/x')",
    "a device": "os.mknod('n', 0o600 | stat.S_IFCHR, os.makedev(1, 3))",
    "shared memory": "import _posixshmem; _posixshmem.shm_open('/loram-test', os.O_CREAT | os.O_RDWR, mode=0o600)",
    "the parent's processors": "os.sched_setaffinity(os.getppid(), {0})",
    "another root": "os.chroot('.')",
    "the parent's environment": "assert open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "its own memory": "assert open('/proc/self/mem', 'rb')",
    "root's files": "open(HIDDEN).read()",
    "a thread": "import _thread, time; _thread.start_new_thread(time.sleep, (1,))",
    "the parent's signals": "os.kill(os.getppid(), 0)",
    "its own tracing": "sys.settrace(lambda *a: None)",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that everybody may write to, with a file that nobody but us may read."""
    with tempfile.TemporaryDirectory() as folder:  # the folders that lead to pytest's own are closed
        Path(folder).chmod(0o777)
        (Path(folder) / "hidden").write_text("secret")
        (Path(folder) / "hidden").chmod(0o600)
        yield Path(folder)


def trying(trick: str, outside: Path) -> str:
    return f"import os, stat, sys\nOUT, HIDDEN = {str(outside)!r}, {str(outside / 'hidden')!r}\n{trick}\n"


@pytest.mark.parametrize("trick", TRICKS)
def test_a_program_does_not_get_out_of_its_folder_by(trick: str, outside: Path) -> None:
    if trick == "root's files" and run_program("", "").confinement.files == "guarded" and os.geteuid() != 0:
        pytest.skip("without Landlock a program reads what its user reads")

    outcome = run_program(trying(TRICKS[trick], outside), "")

    assert not outcome.passed
    assert [path.name for path in outside.iterdir()] == ["hidden"]


def test_the_kernel_alone_keeps_programs_in(outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if run_program("", "").confinement.files == "guarded":
        pytest.skip("this kernel has no Landlock")
    for name in ("confining.py", "confined.py"):
        text = Path(programs.__file__).with_name(name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace('    _prepare(os.path.realpath(job["folder"]))\n', ""))
    monkeypatch.setattr(programs, "_RUNNER", tmp_path / "confining.py")
    same_user = set() if os.geteuid() == 0 else {"the parent's processors", "the parent's signals"}
    excepted = {"its own tracing"} | same_user
    tricks = [trick for name, trick in TRICKS.items() if name not in excepted]
    program = "".join(
        f"try:\n    exec({trying(trick, outside)!r})\nexcept (OSError, ImportError, RuntimeError):\n    kept += 1\n"
        for trick in tricks
    )

    assert run_program("import os\nassert os.mkdir('mine') is None", "").passed, "the guard is off"
    assert run_program(f"kept = 0\n{program}", f"assert kept == {len(tricks)}").passed
    assert [path.name for path in outside.iterdir()] == ["hidden"]


SEARCHES = {
    "frames": "frame = sys._getframe()\nwhile frame:\n    seen.append(frame.f_locals)\n    frame = frame.f_back",
    "tracebacks": (
        "try:\n    open('/x', 'w')\nexcept Exception as err:\n    tb = err.__traceback__\n    while tb:\n"
        "        frame = tb.tb_frame\n        while frame:\n"
        "            seen.append((frame.f_locals, frame.f_globals))\n"
        "            frame = frame.f_back\n        tb = tb.tb_next"
    ),
    "modules": "seen += [vars(module) for module in list(sys.modules.values())]",
    "arguments": "seen += [sys.argv, sys.orig_argv, os.environ]",
    "files": (
        "for place in range(64):\n    try:\n        seen.append(os.pread(place, 10 ** 6, 0))\n"
        "    except OSError:\n        pass"
    ),
}


@pytest.mark.parametrize("where", SEARCHES)
def test_a_program_does_not_find_the_proof_in(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = "5a" * 32  # made up, so that the program can look for it
    monkeypatch.setattr(programs.secrets, "token_hex", lambda _: proof)
    program = f"import os, sys\nseen = []\n{SEARCHES[where]}\nassert seen\nhalf = '5a5a' * 4\n"
    # The text that the program itself holds is not the proof, but half of it, written otherwise.
    tests = "said = repr(seen)\nassert half * 4 not in said"

    assert run_program(program, tests).passed
    assert not run_program(f"{program}seen.append(half * 4)\n", tests).passed, "the search finds what is there"


def test_the_writer_of_the_proof_cannot_be_exchanged_or_called() -> None:
    program = """
import sys
frame = sys._getframe()
while frame:
    names = frame.f_locals
    for name in ("write", "proof"):
        if name in names:
            assert not names["proof"]
            names["write"] = print
            names["leave"](0)
    frame = frame.f_back
f = lambda x: 0
"""

    assert not run_program(program, f"{DONE}\ncheck(f)").passed


def test_a_program_that_does_not_fit_its_tests_cannot_swallow_them() -> None:
    assert not run_program("f = lambda x: 0\n" + "'" * 3, f"{DONE}\ncheck(f)\n" + "'" * 3).passed


@pytest.mark.skipif(os.geteuid() != 0, reason="of root alone")
def test_as_root_nothing_runs_where_the_rights_cannot_be_given_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(Path(programs.__file__).with_name("confined.py"), tmp_path)
    text = Path(programs.__file__).with_name("confining.py").read_text(encoding="utf-8")
    no_landlock = text.replace("_RESTRICT_SELF = 444,", "_RESTRICT_SELF = 9999,")
    unreadable = no_landlock.replace("return all(os.access", "return not any(os.access")
    assert len({text, no_landlock, unreadable}) == 3
    (tmp_path / "confining.py").write_text(unreadable)
    monkeypatch.setattr(programs, "_RUNNER", tmp_path / "confining.py")

    with pytest.raises(ResourceError, match=r"nobody cannot read Python .* run this as another user"):
        run_program("", "")


@pytest.mark.parametrize(
    ("programs", "passed", "k"), [(10, 3, 1), (10, 3, 10), (6, 2, 3), (5, 0, 2), (5, 5, 5), (4, 4, 1)]
)
def test_pass_at_k_is_the_share_of_choices_of_k_with_one_that_passes(programs: int, passed: int, k: int) -> None:
    choices = list(combinations(range(programs), k))

    expected = sum(any(place < passed for place in choice) for choice in choices) / len(choices)

    assert pass_at_k(programs, passed, k) == pytest.approx(expected)


def test_pass_at_more_than_there_are_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="pass@10 needs at least 10 programs"):
        pass_at_k(5, 1, 10)


def code_task(folder: Path, **changes: Any) -> Path:
    """A task in the layout of HumanEval; whatever the model adds is behind a #, so the prompt decides."""
    problems = [
        {"prompt": "def f(x):\n    return x + 1  # ", "test": DONE, "entry_point": "f"},
        {"prompt": "def f(x):\n    return x + 2  # ", "test": DONE, "entry_point": "f"},
        {"prompt": "def f(x):\n    return 1 + x  # ", "test": DONE, "entry_point": "f"},
    ]
    judge = "import os\n\n\ndef judge(references, predictions):\n    return os.environ['JUDGED_BY_THE_HARNESS']\n"
    folder.mkdir()
    (folder / "judging.py").write_text(f"raise RuntimeError('read')\n{judge}")
    task = {
        "task": "tiny_code",
        "unsafe_code": True,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}\ncheck({{entry_point}})",
        "num_fewshot": 0,
        "repeats": 2,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": True, "temperature": 0.5},
        **changes,
    }
    write_task(folder, task, test=problems)
    text = (folder / "tiny_code.yaml").read_text(encoding="utf-8")
    judged = "metric_list:\n- metric: !function judging.judge\n  aggregation: mean\n  higher_is_better: true\n"
    (folder / "tiny_code.yaml").write_text(text + judged, encoding="utf-8")
    return folder


def test_programs_are_run_only_if_it_is_said_so(models: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"base": models["base"], "include_path": code_task(tmp_path / "code")}

    before = torch.get_rng_state()

    with pytest.raises(InvalidRequestError, match="--run-generated-code"):
        evaluate_tasks("tiny_code", **options)
    measured = evaluate_tasks("tiny_code", run_generated_code=True, dtype=torch.float32, **options)

    numbers = {score.metric: (score.value, score.samples) for score in measured.scores}
    assert numbers == {"pass@1": (pytest.approx(2 / 3), 3), "pass@2": (pytest.approx(2 / 3), 3)}
    assert measured.scores[0].stderr == pytest.approx(1 / 3)
    assert (measured.tasks[0].programs, measured.tasks[0].generation["temperature"]) == (2, 0.5)  # type: ignore[index]
    assert measured.confinement is not None
    assert measured.provenance.settings["limits"]["cpu_seconds"] == 5
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are his own"


def test_a_code_task_whose_prompts_come_from_a_file_of_code_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = code_task(tmp_path / "code")
    text = (folder / "tiny_code.yaml").read_text(encoding="utf-8")
    (folder / "tiny_code.yaml").write_text(text.replace("'{{prompt}}'", "!function judging.judge"), encoding="utf-8")

    with pytest.raises(InvalidRequestError, match="makes its prompts with"):
        evaluate_tasks("tiny_code", base=models["base"], include_path=folder, run_generated_code=True)


def test_the_harness_itself_never_judges_programs_of_the_preset() -> None:
    (planned,) = preview_tasks("code")

    overlay = _overlay(planned)

    assert [named["metric"] for named in overlay["metric_list"]] == ["bypass"]
    assert not {"include", "filter_list", "process_results"} & set(overlay)
    assert overlay["repeats"] == 10
    drawn = {"do_sample": True, "temperature": 0.2, "top_p": 0.95, "max_gen_toks": 512}
    assert overlay["generation_kwargs"].items() >= drawn.items()
    assert overlay["doc_to_text"] == "{{prompt}}", "what the model is asked is the harness's"


# The command, and where its results go.


def loram(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_one_command_measures_losses_and_tasks_and_the_card_shows_them(
    models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "held_out.jsonl", tmp_path / "results.json"
    data.write_text('{"prompt": "w4 w5", "completion": " w6 w7"}\n')
    given = ("--base", models["base"], "--recovered", models["recovered"], "--task-folder", tasks)

    run = loram("eval", data, "--tasks", "tiny_choice", *given, "-o", out, "--json")

    assert run.exit_code == 0, run.output
    values = json.loads(out.read_text())
    assert values == json.loads(run.stdout)
    assert [row["model"] for row in values["rows"]] == ["base", "base + recovered adapter"]
    assert [part["part"] for part in values["provenance"]["parts"]] == ["base", "recovered"]
    assert values["provenance"]["settings"]["data_sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert {score["model"] for score in values["tasks"]["scores"]} == {"base", "base + recovered adapter"}
    text = make_card(models["recovered"], license="mit", evaluation=values).text
    value = next(s["value"] for s in values["tasks"]["scores"] if s["model"] == "base" and s["metric"] == "acc")
    assert f"| `tiny_choice` (own task file) | `acc` | 0 | 24 | {value:.4f} ±" in text
    assert "| base + recovered adapter | " in text
    assert "\nNot measured" not in text


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "tiny_choice", "--num-fewshot", "-1"), "num_fewshot is -1"),
        (("--tasks", "humaneval"), "--run-generated-code"),
        (("--tasks", "tiny_choice", "--as", "vllm", "--release", "R"), "vLLM opens no release"),
        (("--tasks", "tiny_choice", "--adapter", "A"), "needs that release"),
    ],
)
def test_no_loss_is_measured_if_the_tasks_of_the_same_request_cannot_be(
    models: dict[str, Path],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
    dry_run: tuple[str, ...],
) -> None:
    (tmp_path / "held_out.txt").write_text("w4 w5")
    monkeypatch.setattr("loram_hub.evaluation.evaluating.held_out_loss", lambda *a, **k: pytest.fail("measured"))

    run = loram("eval", tmp_path / "held_out.txt", "--base", models["base"], "--task-folder", tasks, *options, *dry_run)

    assert run.exit_code == 2, run.output
    assert message in " ".join(run.output.split())


def test_losses_are_written_before_tasks_begin(
    models: dict[str, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "held_out.txt", tmp_path / "results.json"
    data.write_text("w4 w5")

    def fail(*args: Any, **options: Any) -> None:
        raise AccessError("the network is gone")

    monkeypatch.setattr("loram_hub.downstream.measuring.load_tasks", fail)

    run = loram("eval", data, "--tasks", "tiny_choice", "--base", models["base"], "--task-folder", tasks, "-o", out)

    assert run.exit_code == 5, run.output
    assert [row["model"] for row in json.loads(out.read_text())["rows"]] == ["base"]


def test_data_that_are_not_there_are_missed_in_a_dry_run_too(models: dict[str, Path], tmp_path: Path) -> None:
    run = loram("eval", tmp_path / "gone.jsonl", "--base", models["base"], "--dry-run")

    assert run.exit_code == 2
    assert "gone.jsonl is no file or folder" in " ".join(run.output.split())


def test_results_of_another_adapter_get_onto_no_card(
    models: dict[str, Path], results: TaskResults, tmp_path: Path
) -> None:
    scaled = tmp_path / "scaled"
    shutil.copytree(models["recovered"], scaled)
    config = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    (scaled / "loram.json").unlink()  # so that it is an adapter from elsewhere, of the same shapes

    evaluation = {"tasks": results.to_dict()}

    assert "`tiny_choice`" in make_card(models["recovered"], license="mit", evaluation=evaluation).text
    assert "`tiny_choice`" in make_card(models["release"], license="mit", evaluation=evaluation).text
    with pytest.raises(InvalidRequestError, match=r"recovered has a 'adapter_config\.json' with the SHA-256"):
        make_card(scaled, license="mit", evaluation=evaluation)


def test_a_dry_run_says_what_would_be_measured_and_downloaded(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "results.json"

    run = loram("eval", "--tasks", "math", "--base", models["base"], "-o", out, "--dry-run", "--json")

    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert [task["task"] for task in found["tasks"]] == ["mathqa", "gsm8k_cot"]
    assert found["tasks"][1]["download"] == "hf download --repo-type dataset openai/gsm8k"
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give DATA, --tasks, or both"),
        (("--tasks", "math", "-o", "no/such/folder/results.json"), "no/such/folder"),
        (("--protocol", "paper", "--tasks", "math"), "--protocol"),
    ],
)
def test_a_request_that_makes_no_sense_ends_with_exit_code_2(
    models: dict[str, Path], arguments: tuple[str, ...], message: str
) -> None:
    run = loram("eval", "--base", models["base"], *arguments)

    assert run.exit_code == 2, run.output
    assert re.search(message, " ".join(run.output.split()))


def test_the_papers_protocol_reads_alpaca_records_in_its_prompts_and_cuts_the_end(
    models: dict[str, Path], tmp_path: Path
) -> None:
    records = [
        {"instruction": "w4 w5", "input": "", "output": "w6 w7"},
        {"instruction": "w8", "input": "w9 w10", "output": "w11 " * 600},
        {"instruction": "w8 " * 600, "input": "", "output": "w12"},
    ]
    data = tmp_path / "alpaca.json"
    data.write_text(json.dumps(records))
    base = save_tokenizer(save_base(tmp_path / "base", tiny_config(layers=2, max_position_embeddings=1024)))

    found = evaluate(data, base=base, protocol="paper", dtype=torch.float32)

    assert found.protocol is not None
    assert {key: found.protocol[key] for key in ("name", "max_tokens", "records", "layout", "sha256")} == {
        "name": "paper", "max_tokens": 512, "records": 2000, "layout": "alpaca",
        "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert (found.examples, found.cut_examples) == (2, 2), "nothing is left to score of the third"
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    expected, tokens = 0.0, 0
    for record in records[:2]:
        prompt = "Below is an instruction that describes a task"
        prompt += ", paired with an input that provides further context" if record["input"] else ""
        prompt += ". Write a response that appropriately completes the request.\n\n### Instruction:\n"
        prompt += record["instruction"] + (f"\n\n### Input:\n{record['input']}" if record["input"] else "")
        asked = tokenizer(prompt + "\n\n### Response:\n")["input_ids"]
        answer = [*tokenizer(record["output"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*asked, *answer][:512]])
        labels = ids.clone()
        labels[:, : len(asked)] = -100
        counted = ids.shape[1] - len(asked)
        with torch.no_grad():
            expected += model(input_ids=ids, labels=labels).loss.item() * counted
        tokens += counted
    assert found.tokens == tokens
    assert found.rows[0].loss == pytest.approx(expected / tokens, rel=1e-5)


@pytest.mark.parametrize("option", [("--limit", "5"), ("--max-tokens", "100")])
def test_a_protocol_takes_no_length_or_limit_of_ones_own(models: dict[str, Path], option: tuple[str, str]) -> None:
    run = loram("eval", "data.jsonl", "--protocol", "paper", "--base", models["base"], *option)

    assert run.exit_code == 2
    assert "2,000 records, 512 tokens" in " ".join(run.output.split())
