"""`loram publish` against a Hub of its own, killed again and again: the release is the same as without a kill."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hub_server import HubServer
from pipeline_materials import content_of, save_tiny_base, some_texts, tiny_recipe, write_recipe
from trust.forks import Ended, Forks

from loram_hub.files import read_json
from loram_hub.masks import WEIGHT_MASKS
from loram_hub.pipeline import read_recipe

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "datasets", "loram_hub.alignment.aligning", "loram_hub.pipeline", "loram_hub.cards.pictures", "loram_hub.cli",
    "loram_hub.sparsification.sparsifying",
    "torch._dynamo", "torch.distributed.checkpoint", "transformers.models.llama.modeling_llama", "accelerate",
    "loram_hub.cpu_nf4", "matplotlib.backends.backend_agg", "transformers.integrations.bitsandbytes",
)  # fmt: skip
BASE, TEXTS, RELEASE = "org/Tiny", "org/texts", "org/Tiny-LoRAM"
KILLS = 8
SMOLLM2 = ROOT / "publish" / "smollm2-135m.yaml"
WAYPOINTS = (
    ".pruned.partial",
    "aligned-run/checkpoints/step-00000003",
    ".quantized.partial",
    ".publish/quantize.json",
    ".publish/card.json",
)
"""What is there when the recipe of SmolLM2 is killed: while it prunes, aligns, quantizes, evaluates and pushes."""
SPARSE_WAYPOINTS = (
    ".pruned.sparsifying/layer-00000.json",
    ".pruned.sparsifying/layer-00003.json",
    "aligned-run/checkpoints/step-00000002",
    ".publish/quantize.json",
)
"""What is there when a sparse recipe is killed: twice while it prunes, while it aligns, while it evaluates."""


def dataset(texts: list[str], config: str) -> dict[str, bytes]:
    """Return the files of a dataset with one configuration."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer)
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files: data/*.parquet\n---\n"
    return {"README.md": card.encode(), "data/texts.parquet": buffer.getvalue()}


class Publishers:
    """People who publish one recipe after the other, each on a new Hub under the same address."""

    def __init__(self, folder: Path, fill: Callable[[HubServer], None]) -> None:
        self.folder = folder
        self._count = 0
        with HubServer(folder / "filled-hub") as hub:
            self._port = int(hub.url.rpartition(":")[2])
            fill(hub)
            settings = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow's allocator: no second thread
            self.environment = hub.environment(folder / "home", xet=False, **settings)

    @contextmanager
    def hub(self) -> Iterator[HubServer]:
        """Open a Hub with base and data, at the same commits each time, and nothing else."""
        self._count += 1
        folder = shutil.copytree(self.folder / "filled-hub", self.folder / f"hub-{self._count}")
        with HubServer(folder, port=self._port) as hub:
            yield hub
        shutil.rmtree(folder)


def published(hub: HubServer, repo_id: str) -> dict[str, bytes]:
    """Return the files of the release on the Hub."""
    return hub.repo(repo_id).files()


def publish_killed(
    forks: Forks, command: tuple[str | Path, ...], *, seconds: float, kills: int, seed: int
) -> tuple[Ended, int]:
    """Run a command, killed at random moments until so many kills have landed; returns its end and their number."""
    rng = random.Random(seed)
    landed = 0
    for _ in range(3 * kills):
        # A resumed run is shorter, so moments lie in what one stage takes rather than in all of it.
        ended = forks.run(*command, kill_after=rng.random() * seconds)
        landed += ended.was_killed
        if not ended.was_killed or landed == kills:
            break
    return forks.run(*command), landed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Publishers, Forks, Path]]:
    folder = tmp_path_factory.mktemp("publishers")
    base = save_tiny_base(folder / "base")
    texts = dataset(some_texts(), "default")

    def fill(hub: HubServer) -> None:
        hub.add_repo(BASE, base)
        hub.add_repo(TEXTS, texts, kind="datasets")

    recipe = tiny_recipe(folder, base=BASE, push={"tag": "v1", "private": False})
    recipe["prune"]["calibration"] = recipe["evaluate"]["data"] = TEXTS
    recipe["align"]["corpora"] = [{"source": TEXTS}]
    publishers = Publishers(folder, fill)
    with Forks(IMPORTED, publishers.environment) as forks:
        yield publishers, forks, write_recipe(folder / "recipe.yaml", recipe)


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    tiny: tuple[Publishers, Forks, Path], figure: Callable[[str], None]
) -> None:
    publishers, forks, recipe = tiny
    work = publishers.folder / "work"
    command = ("publish", recipe, "--work-dir", work)
    with publishers.hub() as hub:
        whole = forks.run(*command)
        assert whole.status == 0, whole.output
        wanted = published(hub, RELEASE)
        assert hub.repo(RELEASE).tags == {"v1": hub.repo(RELEASE).refs["main"]}
        assert forks.run(*command).status == 0
        assert len(hub.repo(RELEASE).history("main")) == 2  # a repository begins with a commit
    undisturbed = content_of(work / "quantized")

    landed = 0
    for seed in range(8):
        shutil.rmtree(work)
        with publishers.hub() as hub:
            ended, kills = publish_killed(forks, command, seconds=whole.seconds, kills=4, seed=seed)
            assert ended.status == 0, ended.output
            assert published(hub, RELEASE) == wanted
            assert content_of(work / "quantized") == undisturbed
            assert not [path for path in work.iterdir() if path.name.endswith((".partial", ".replaced", ".removed"))]
        landed += kills
        if landed >= KILLS:
            break

    assert landed >= KILLS
    figure(f"loram publish: {landed} kills of a tiny recipe, the pushed release is always the undisturbed one's")


def test_a_killed_sparse_run_ends_with_the_bytes_of_an_undisturbed_one(
    tiny: tuple[Publishers, Forks, Path], tmp_path: Path
) -> None:
    """Pruning is killed between layers, and goes on after those that are finished."""
    publishers, forks, structured = tiny
    prune = {"method": "sparsegpt", "sparsity": 0.55, "samples": 16, "tokens": 32, "calibration": TEXTS}
    recipe = write_recipe(tmp_path / "recipe.yaml", read_json(structured) | {"prune": prune})
    work = publishers.folder / "sparse"
    command = ("publish", recipe, "--work-dir", work)
    with publishers.hub() as hub:
        whole = forks.run(*command)
        assert whole.status == 0, whole.output
        wanted = published(hub, RELEASE)
    undisturbed = content_of(work / "quantized")
    assert WEIGHT_MASKS in undisturbed
    shutil.rmtree(work)

    with publishers.hub() as hub:
        for waypoint in SPARSE_WAYPOINTS:
            killed = forks.run(*command, kill_when=work / waypoint, kill_after=0.02)
            assert killed.was_killed, killed.output
            assert (work / waypoint).exists()
        ended = forks.run(*command)
        assert ended.status == 0, ended.output
        assert published(hub, RELEASE) == wanted

    assert content_of(work / "quantized") == undisturbed
    assert not [path for path in work.iterdir() if path.name.endswith((".partial", ".replaced", ".sparsifying"))]


def test_a_moved_branch_does_not_change_what_was_begun(tiny: tuple[Publishers, Forks, Path]) -> None:
    publishers, forks, recipe = tiny
    work = publishers.folder / "moved"
    command = ("publish", recipe, "--work-dir", work)
    with publishers.hub() as hub:
        assert forks.run(*command, "--until", "align").status == 0
        first = content_of(work / "aligned")
        hub.add_repo(TEXTS, dataset(some_texts(seed=1), "default"), kind="datasets")
        hub.add_repo(BASE, {**hub.repo(BASE).files(), "extra.txt": b"new"})

        assert forks.run(*command).status == 0

        assert content_of(work / "aligned") == first


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"push": {"tag": "a tag"}}, 2, "push.tag is 'a tag', which is no name for a tag"),
        ({"repo_id": "nobody/Tiny"}, 5, "nobody/Tiny cannot be written to: alice is no member of nobody"),
        ({"base": "org/none"}, 5, "org/none"),
    ],
)
def test_what_the_hub_would_refuse_in_the_end_is_said_in_the_beginning(
    tiny: tuple[Publishers, Forks, Path], tmp_path: Path, change: dict[str, object], code: int, message: str
) -> None:
    publishers, forks, _ = tiny
    recipe = tiny_recipe(tmp_path, base=BASE, push={"private": True}) | change
    recipe["prune"]["calibration"] = recipe["evaluate"]["data"] = TEXTS
    recipe["align"]["corpora"] = [{"source": TEXTS}]
    with publishers.hub():
        ended = forks.run("publish", write_recipe(tmp_path / "recipe.yaml", recipe), "--work-dir", tmp_path / "work")

    assert ended.status == code, ended.output
    assert message in ended.output
    assert not (tmp_path / "work" / "pruned").exists()


@pytest.mark.slow
def test_the_recipe_of_smollm2_killed_five_times_ends_with_the_same_bytes(
    real_model: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """The recipe as it is shipped, with the real model; only the texts of its datasets are this machine's own."""
    from loram_hub.demo.corpus import stdlib_texts

    recipe = read_recipe(SMOLLM2)
    texts = [text for text in stdlib_texts() if len(text) > 200]

    def fill(hub: HubServer) -> None:
        hub.add_repo(recipe.base, {**_files(real_model), "README.md": b"---\nlicense: apache-2.0\n---\n# SmolLM2\n"})
        hub.add_repo("HuggingFaceFW/fineweb", dataset(texts[0::3], "sample-10BT"), kind="datasets")
        hub.add_repo("open-web-math/open-web-math", dataset(texts[1::3], "default"), kind="datasets")
        held_out = [text[:400] for text in texts[2::3]]  # as long as its records are
        hub.add_repo("Salesforce/wikitext", dataset(held_out, "wikitext-2-raw-v1"), kind="datasets")

    publishers = Publishers(tmp_path, fill)
    command = ("publish", SMOLLM2, "--work-dir", tmp_path / "work", "--delete-intermediate")
    with Forks(IMPORTED, publishers.environment) as forks:
        with publishers.hub() as hub:
            whole = forks.run(*command)
            assert whole.status == 0, whole.output
            wanted = published(hub, recipe.repo_id)
        shutil.rmtree(tmp_path / "work")
        rng = random.Random(0)
        with publishers.hub() as hub:
            for waypoint in WAYPOINTS:
                killed = forks.run(*command, kill_when=tmp_path / "work" / waypoint, kill_after=rng.random() / 5)
                assert killed.was_killed, killed.output
                assert (tmp_path / "work" / waypoint).exists()
            ended = forks.run(*command)
            assert ended.status == 0, ended.output
            assert published(hub, recipe.repo_id) == wanted
            assert hub.repo(recipe.repo_id).tags.keys() == {"v1"}
    figure(f"loram publish smollm2-135m.yaml: {len(WAYPOINTS)} kills, same bytes; {whole.seconds:.0f} s undisturbed")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
