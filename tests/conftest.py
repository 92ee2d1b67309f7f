"""What holds for every test: no network, nothing of the user's, no GPU unless asked for.

huggingface_hub reads its settings when it is imported, so they are set here, before any test module is.
"""

from __future__ import annotations

import atexit
import gc
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import live_hub
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

_HOME = Path(tempfile.mkdtemp(prefix="loram-tests-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)

for _name in (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
):
    os.environ.pop(_name, None)
os.environ.update(
    HF_HOME=str(_HOME / "huggingface"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",  # it warns when a test forks
)

# Building a small model can take longer than Hypothesis' 200 ms; the examples are the same in every run of CI.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """Let no test reach beyond this machine; an audit hook sees what any library does."""
    if event != "socket.connect" or args[0].family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = str(args[1][0])
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        raise RuntimeError(f"a test tried to connect to {host}")


sys.addaudithook(_refuse_network)


@pytest.fixture(params=["loopback", "live"] if live_hub.LIVE_ENDPOINT and live_hub.LIVE_TOKEN else ["loopback"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[live_hub.Place]:
    """Serve the loopback Hub; for those who ask for it, a real one as well."""
    if request.param == "live":
        there = live_hub.live_place(live_hub.LIVE_ENDPOINT or "", live_hub.LIVE_TOKEN or "", tmp_path)
        yield there
        there.clean_up()
    else:
        with live_hub.HubServer(tmp_path / "hub") as hub:
            yield live_hub.loopback_place(hub, tmp_path)


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return SmolLM2-135M as a checkpoint, converted once for all processes that run tests side by side.

    It stays where `base_model` looks for it.
    """
    pytest.importorskip("gguf")
    from loram_hub.demo.base_model import base_model

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    (folder / "loram-hub").mkdir(exist_ok=True)
    home = _HOME / "huggingface" / "loram-hub"
    home.parent.mkdir(exist_ok=True)
    if not home.exists():  # another test could have converted it for itself
        home.symlink_to(folder / "loram-hub", target_is_directory=True)
    with FileLock(folder / "loram-hub.lock"):
        return base_model()


_FIGURES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Give figures a place."""
    config.stash[_FIGURES] = []


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a measured figure at the end of the run, where the documents take it from."""
    return request.config.stash[_FIGURES].append


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker's figures over, where tests run in several processes."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = session.config.stash[_FIGURES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the figures of a worker."""
    node.config.stash[_FIGURES] += getattr(node, "workeroutput", {}).get("figures", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures that tests have measured."""
    if figures := config.stash[_FIGURES]:
        terminalreporter.section("figures")
        for line in sorted(figures):
            terminalreporter.line(line)


def pytest_collection_finish() -> None:
    """Spare what the tests have imported from garbage collection, which several functions ask for at their end."""
    gc.freeze()


_LONGEST = (
    "test_pipeline_kills.py", "test_sparse_real_model.py", "test_benchmarks.py", "test_finetuning.py",
    "trust/test_kills.py", "test_demo.py", "alignment/test_ranks.py", "trust/test_faults.py", "test_recipes.py",
    "test_docs_snippets.py", "test_study_results.py", "test_finetune_kills.py", "test_pipeline.py", "test_studies.py",
    "test_notebooks.py",
)  # fmt: skip
"""Files that take longest. They come first: at the end, one of them would keep all other processes waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and skip what needs a GPU where there is none.

    torch is imported only if such a test was collected.
    """
    place = {Path(__file__).parent / name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
