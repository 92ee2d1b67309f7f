"""Every command and snippet of the documents runs, or says why it does not and is checked as far as can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import click
import pytest
from docs_blocks import Block, blocks_of, check_command, check_json, commands_of, pages, problem_of
from docs_hub import ACCOUNTS, ME, ORGANIZATIONS, RELEASE, SPARSE_RELEASE, fill, reader_folder
from docs_runner import BlockError, Interpreter, Session
from docs_stand_ins import PROGRAMS
from hub_server import HubServer

Reader = Callable[[str], Session]
"""Starts to read a page."""
ALL_PAGES = pages()
TESTED = tuple(page for page in ALL_PAGES if any(block.kind for block in blocks_of(page)))
SUBSTITUTED: Mapping[str, str] = {
    "HF_ENDPOINT=http://127.0.0.1:...": "HF_ENDPOINT=$HF_ENDPOINT",  # the server chooses its port
    "HF_HOME=$(mktemp -d)": "HF_HOME=$HF_HOME",  # the interpreter that forks has read it
    'device_map={"": 0}': 'device_map="cpu"',  # there is no GPU, which TRL's defaults want, too
    "SFTTrainer(model, train_dataset=data,": "SFTTrainer(model, args, train_dataset=data,",
}
"""What a reader has to fill in, and what depends on the machine."""
_TRAINER = """
import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from loram_hub import AutoLoramModel

model = AutoLoramModel.from_pretrained({release!r}, dtype=torch.float32)
args = SFTConfig(output_dir={outputs!r}, max_steps=2, save_steps=2, use_cpu=True, bf16=False, report_to="none")
lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
data = load_dataset("json", data_files="tasks.jsonl", split="train")
"""
PRESUMED: Mapping[tuple[str, str], str] = {
    ("consume/README.md", "mask_lora_(trainer.model)"): _TRAINER.format(release=SPARSE_RELEASE, outputs="masked"),
    ("the card of a release", "SFTTrainer(model"): (
        "from trl import SFTConfig\nargs = SFTConfig('outputs', max_steps=2, use_cpu=True, bf16=False)\n"
    ),
    ("consume/README.md", "callbacks=[RecoverCallback()"): _TRAINER.format(release=RELEASE, outputs="outputs"),
}
"""What a snippet of a page with these words takes for granted: it is about a script that its reader has."""
ALREADY_MADE: Mapping[str, tuple[str, ...]] = {
    "docs/evaluating.md": ("my-release", "my-task", "plain-lora"),
    "docs/quickstart-publisher.md": ("BASE",),
    "docs/serving.md": ("BASE", "my-adapter"),
    "the card of an adapter": ("my-adapter",),
}
"""What a reader of a page has made before."""
PROMISED: Mapping[str, tuple[str, ...]] = {
    "README.md": ("my-adapter/adapter_model.safetensors", "my-task/recovered", "Llama-2-70B-LoRAM-0.85/quantized"),
    "docs/evaluating.md": ("evaluation.json", "report.html", "norms.html"),
    "docs/fine-tuning.md": ("fit.png", "my-task/recovered/adapter_config.json", "my-adapter"),
    "docs/publishing.md": ("Llama-2-70B-LoRAM-0.85/quantized/README.md",),
    "docs/quickstart-consumer.md": ("dates/adapter", "dates/recovered"),
    "docs/quickstart-publisher.md": ("SmolLM2-135M-Instruct-LoRAM-0.65/quantized", "my-adapter"),
    "docs/serving.md": ("merged/model.safetensors",),
    "docs/variants.md": ("rand", "stru", "semi", "unst"),
    "consume/README.md": (
        "my-task/recovered/adapter_model.safetensors", "my-adapter/adapter_model.safetensors", "outputs/recovered-2",
        "recovered", "recovered-too",
    ),
    "publish/README.md": ("Llama-2-70B-LoRAM-0.85/quantized/README.md", "Llama-2-70B-LoRAM-0.85/aligned-run/log.jsonl"),
}  # fmt: skip
"""Files that are there after the blocks of a page."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub"), tokens=ACCOUNTS, organizations=ORGANIZATIONS) as server:
        yield server


@pytest.fixture(scope="module")
def interpreter(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    """The interpreter of all pages, and a Hub that has what they name."""
    folder = tmp_path_factory.mktemp("docs")
    environment = hub.environment(folder / "home", ME, xet=False, EDITOR="editor")
    with Interpreter(folder / "i", environment, stand_ins=PROGRAMS) as started:
        yield started


@pytest.fixture(scope="module")
def made(hub: HubServer, interpreter: Interpreter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was made for the Hub and for readers who have come further."""
    folder = tmp_path_factory.mktemp("made") / "made"
    folder.mkdir()
    with Session(interpreter, folder) as maker:
        fill(hub, maker)
    return folder


@pytest.fixture
def reader(hub: HubServer, interpreter: Interpreter, made: Path, tmp_path: Path) -> Iterator[Reader]:
    """Somebody on a Hub that has only what was there before anybody read."""
    before = dict(hub.repos)
    with ExitStack() as opened:

        def start(page: str) -> Session:
            folder = reader_folder(tmp_path / "reader", made, ALREADY_MADE.get(page, ()))
            return opened.enter_context(Session(interpreter, folder))

        yield start
    hub.repos.clear()
    hub.repos.update(before)


def run(session: Session, block: Block) -> None:
    """Run a block, or check it as far as can be."""
    assert block.kind is not None
    if block.kind == "json":
        check_json(block)
    elif block.kind == "yaml" or block.reason is not None:
        session.run("python", f"import docs_blocks\ndocs_blocks.check(docs_blocks.{block!r})\n", block.place)
    else:
        code = block.text
        for written, filled in SUBSTITUTED.items():
            code = code.replace(written, filled)
        for (page, words), before in PRESUMED.items():
            if page == block.page and words in code:
                session.run("python", before, block.place)
        session.run(block.kind, code, block.place)


def test_there_are_pages_and_blocks_of_every_kind() -> None:
    kinds = [block.kind for page in ALL_PAGES for block in blocks_of(page) if block.reason is None]

    assert {"README.md", "docs/fine-tuning.md", "consume/README.md"} <= set(TESTED)
    assert all(kinds.count(kind) >= 3 for kind in ("sh", "python", "yaml"))


@pytest.mark.parametrize("page", ALL_PAGES)
def test_every_block_names_its_language(page: str) -> None:
    assert [f"{block.place} {problem}" for block in blocks_of(page) if (problem := problem_of(block))] == []


@pytest.mark.parametrize("page", TESTED)
def test_every_block_of_a_page_runs_in_its_turn(page: str, reader: Reader) -> None:
    session = reader(page)

    for block in blocks_of(page):
        if block.kind is not None:
            run(session, block)

    assert [name for name in PROMISED.get(page, ()) if not (session.folder / name).exists()] == []


@pytest.mark.parametrize("release", [RELEASE, SPARSE_RELEASE], ids=["structured", "sparse"])
def test_what_the_card_of_a_release_says_runs(release: str, hub: HubServer, reader: Reader) -> None:
    session = reader("the card of a release")
    blocks = blocks_of("the card of a release", hub.repo(release).files()["README.md"].decode())

    assert [block.kind for block in blocks] == ["python", *(["python"] if release == SPARSE_RELEASE else []), "json"]
    for block in blocks:
        run(session, block)

    assert (session.folder / "my-adapter" / "adapter_model.safetensors").exists()


def test_what_the_card_of_an_adapter_says_runs(hub: HubServer, reader: Reader) -> None:
    session = reader("the card of an adapter")
    name = "me/Llama-3.1-70B-my-task"
    session.run("sh", f"loram push my-adapter {name}", "the card of an adapter")
    blocks = blocks_of("the card of an adapter", hub.repo(name).files()["README.md"].decode())

    assert [block.kind for block in blocks] == ["python", "sh"]
    for block in blocks:
        run(session, block)


def test_a_session_is_one_shell_one_python_and_one_folder(reader: Reader) -> None:
    session = reader("a page")

    session.run("sh", "mkdir deep && cd deep && export WORD=kept; count=3", "a page:1")
    session.run("python", "number = 41", "a page:2")

    assert session.run("sh", 'echo "$WORD $count $(basename "$PWD")"', "a page:3") == "kept 3 deep\n"
    assert session.run("python", "number += 1\nprint(number)", "a page:4") == "42\n"
    assert "Usage: loram prune" in session.run("sh", "loram prune --help | head -n 1", "a page:5")
    assert session.run(
        "sh", "python - <<'END'\nimport os, sys\nprint(os.environ['WORD'], sys.argv)\nEND", "a page:6"
    ) == ("kept ['-']\n")


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("sh", "echo before; loram info nowhere; echo after", "nowhere is no local folder"),
        ("sh", "loram prune --no-such-option | cat", "No such option"),
        ("sh", "pip install -e '.[no-such-extra]'", "no installation of this project"),
        ("sh", "make no-such-target", "No rule to make target"),
        ("sh", "vllm serve org/base --lora-modules a=b", "required: --enable-lora"),
        ("python", "print('before')\nraise KeyError('gone')", "KeyError: 'gone'"),
        ("python", "import os; os._exit(0)", "failed"),
    ],
)
def test_a_block_that_fails_is_named_with_what_it_printed(kind: str, code: str, said: str, reader: Reader) -> None:
    with pytest.raises(BlockError) as failed:
        reader("a page").run(kind, code, "a page:7")

    assert "a page:7 failed" in str(failed.value)
    assert said in str(failed.value)
    assert "after\n" not in str(failed.value).partition("it printed:")[2]


def test_blocks_are_found_with_their_lines_languages_and_marks() -> None:
    text = (
        "# Page\n\n```sh\nloram info x\n```\n\n1. In a list:\n\n   ```console\n   $ ls\n   ```\n\n"
        "<!-- not run: needs a GPU -->\n```python\nimport torch\n```\n\n    make test\n"
    )

    found = [(block.line, block.language, block.kind, block.text, block.reason) for block in blocks_of("page", text)]

    assert found == [
        (3, "sh", "sh", "loram info x\n", None),
        (9, "console", "sh", "ls\n", None),
        (14, "python", "python", "import torch\n", "needs a GPU"),
        (18, "sh", "sh", "make test\n", None),
    ]
    with pytest.raises(ValueError, match="stands before no block"):
        blocks_of(
            "page",
            "<!-- not run: why -->\n\nText.\n\n```sh\nls\n```\n\n<!-- not run: a -->\n<b>\n\n<!-- not run: b -->\n",
        )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```\nloram info x\n```\n", "names the language ''"),
        ("```shel\nls\n```\n", "names the language 'shel'"),
        ("```text\n$ loram info x\n```\n", "is text, and has a command: $ loram info x"),
        ("<!-- not run: why -->\n```text\nabc\n```\n", "is no code"),
        ("=== Tab\n\n    ```sh\n    ls\n    ```\n", "has a fence in it"),
    ],
)
def test_a_block_that_nobody_would_run_is_refused(text: str, problem: str) -> None:
    (block,) = blocks_of("page", text)

    assert problem in str(problem_of(block))


def test_the_commands_of_a_script_are_found() -> None:
    script = (
        "A=1 loram plan x --json | head  # a comment\ncat > y <<'END'\nloram no command\nEND\n"
        "torchrun --standalone -m loram_hub align a \\\n  b && loram info 'x y'; echo $(loram --version)\n"
    )

    assert list(commands_of(script)) == [
        ["loram", "plan", "x", "--json"], ["head"], ["cat"], ["y"], 
        ["torchrun", "--standalone", "-m", "loram_hub", "align", "a", "b"],
        ["loram", "info", "x y"], ["echo", "$"], ["loram", "--version"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "BASE", "OUT", "--no-such-option"],
        ["prune", "BASE"],
        ["no-such-command"],
        ["prune", "BASE", "OUT", "--pruning-ratio", "most"],
        ["finetune", "recipe.yaml", "--resume", "maybe"],
    ],
    ids=" ".join,
)
def test_a_command_that_is_not_run_is_parsed(arguments: list[str]) -> None:
    check_command(["prune", "BASE", "OUT", "--pruning-ratio", "0.5"])
    check_command(["--quiet", "finetune", "no-such-file.yaml", "--resume", "never"])

    with pytest.raises(click.UsageError):
        check_command(arguments)


@pytest.mark.parametrize(
    ("language", "text", "said"),
    [
        ("sh", "loram prune BASE OUT --no-such-option\n", "No such option"),
        ("sh", "if true\n", "bash cannot read it"),
        ("python", "from loram_hub import no_such_name\n", "no_such_name"),
        ("python", "def\n", "SyntaxError"),
        ("yaml", "align: {no_such_key: 3}\n", "no_such_key"),
        ("yaml", "release: org/x\ndata: {train: [{source: x}]}\ntraining: {steps: many}\n", "steps"),
    ],
)
def test_what_is_checked_without_running_it_can_fail(language: str, text: str, said: str, reader: Reader) -> None:
    block = Block(page="page", line=1, language=language, text=text, reason="needs a GPU")

    with pytest.raises(BlockError, match=said):
        run(reader("page"), block)
