"""The notebooks, run by a real kernel: one publishes a release on a Hub, the other trains on that release."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from email.message import Message
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hub_server import HubServer
from nbclient import NotebookClient
from pipeline_materials import save_texts, save_tiny_base

from loram_hub.adapter import check_adapter
from loram_hub.cards import project
from loram_hub.cards.project import NOTEBOOK, project_file
from loram_hub.files import sha256_of

ROOT = Path(__file__).resolve().parents[1]
PUBLISHERS, CONSUMERS = ROOT / "publish" / "publish.ipynb", ROOT / "consume" / "finetune.ipynb"
BASE, RELEASE = "org/Tiny", "org/Tiny-LoRAM-0.4"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "MPLBACKEND": "agg"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with a base model."""
    folder = tmp_path_factory.mktemp("notebooks")
    with HubServer(folder / "hub") as server:
        server.add_repo(BASE, save_tiny_base(folder / "base", layers=8))
        yield server


def run(notebook: Path, folder: Path, hub: HubServer, parameters: Mapping[str, Any], times: int = 1) -> str:
    """Run a notebook in a folder with other parameters; returns what its cells show, of all times.

    Parameters are set by a cell that is put after the one that is tagged for it, as papermill does.
    """
    content = nbformat.read(notebook, as_version=4)
    (place,) = [n for n, cell in enumerate(content.cells) if "parameters" in cell.metadata.get("tags", ())]
    names: dict[str, Any] = {}
    exec(content.cells[place].source, names)
    assert parameters.keys() <= names.keys()
    given = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    content.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
    client = NotebookClient(content, timeout=300, resources={"metadata": {"path": str(folder)}})
    environment = hub.environment(folder / "home", xet=False, **ENVIRONMENT)
    shown = []
    with client.setup_kernel(env=environment):
        for _ in range(times):
            for number, cell in enumerate(content.cells):
                client.execute_cell(cell, number)
            shown += [shown_by(cell) for cell in content.cells if cell.cell_type == "code"]
    return "\n".join(shown)


def shown_by(cell: nbformat.NotebookNode) -> str:
    """What is to be read below a cell."""
    texts = [output.get("text") or output.get("data", {}).get("text/markdown", "") for output in cell.outputs]
    return "".join(texts)


def test_a_release_is_published_by_one_notebook_and_trained_on_by_the_other(hub: HubServer, tmp_path: Path) -> None:
    texts = str(save_texts(tmp_path / "texts.jsonl"))
    published = run(
        PUBLISHERS, tmp_path, hub,
        {
            "BASE": BASE, "REPO_ID": RELEASE, "RATIO": 0.4, "CALIBRATION": texts, "CORPORA": {texts: 1.0}, "STEPS": 2,
            "BATCH": 2, "MICRO_BATCH": 2, "TOKENS": 16, "WARMUP": 1, "HELD_OUT": texts, "LIMIT": 4, "PUSH": True,
        },
    )  # fmt: skip

    files = hub.repo(RELEASE).files()
    assert f"notebook {project_file(NOTEBOOK)} of loram-hub" in files["README.md"].decode()
    assert {"loram.json", "model.safetensors", "pictures/kept_groups.png", "pictures/alignment_loss.png"} <= set(files)
    assert f"files to {hub.url}/{RELEASE} at {hub.repo(RELEASE).history('main')[0].oid}" in published
    assert "would stop" not in published
    page = (tmp_path / "release" / "report.html").read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")

    tasks = [{"prompt": f"w{n % 40 + 4} w{n % 30 + 9}", "completion": f" w{n % 20 + 5}"} for n in range(24)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    trained = run(
        CONSUMERS, tmp_path, hub,
        {
            "RELEASE": RELEASE, "STEPS": 4, "BATCH": 2, "ACCUMULATION": 1, "TOKENS": 16, "SAVE_EVERY": 2, "HELD_OUT": 6,
            "MEASURE_BASE": True,
        },
        times=2,  # the second time all is done: it trains no more
    )  # fmt: skip

    rows = [line for line in trained.splitlines() if line.startswith(("| base", "| pruned"))]
    assert [row.split(" | ")[0] for row in rows] == 2 * [
        "| base", "| pruned", "| pruned + adapter", "| base + recovered adapter",
    ]  # fmt: skip
    assert len({row for row in rows}) == 4
    assert f"vllm serve {BASE} --revision" in trained
    recovered = tmp_path / "my-task" / "recovered"
    assert check_adapter(recovered).kind == "recovered adapter"
    again = tmp_path / "my-task" / "checkpoints" / "recovered-4"
    assert all(sha256_of(recovered / path.name) == sha256_of(path) for path in again.iterdir())
    assert (tmp_path / "my-task" / "update-norms.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("notebook", [PUBLISHERS, CONSUMERS], ids=["publish", "finetune"])
def test_a_notebook_holds_no_output_of_anybody(notebook: Path) -> None:
    content = json.loads(notebook.read_text())

    assert content["nbformat"] == 4
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    nbformat.validate(nbformat.from_dict(content))


def test_a_card_links_the_notebook_where_the_package_says_where_its_repository_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def states(*urls: str) -> None:
        stated = Message()
        for url in urls:
            stated["Project-URL"] = url
        monkeypatch.setattr(project, "metadata", lambda _: stated)

    assert (ROOT / NOTEBOOK) == CONSUMERS
    states()
    assert project_file(NOTEBOOK) == f"`{NOTEBOOK}`"
    states("Documentation, https://example.org/docs", "Repository, https://example.org/team/loram-hub/")
    assert project_file(NOTEBOOK) == f"[`{NOTEBOOK}`](https://example.org/team/loram-hub/blob/main/{NOTEBOOK})"
    states("Repository, javascript:alert(1)")
    assert project_file(NOTEBOOK) == f"`{NOTEBOOK}`"
