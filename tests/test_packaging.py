"""What users install: the wheel's contents, and a base install that never asks for torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIGHT = [
    *("errors", "files", "architecture", "plan", "checkpoint", "manifest", "release"),
    *("hub", "adapter", "recovery", "inspection", "cli", "digests", "folders", "seals", "tensors"),
    *("licences", "cards", "doctor", "pushing"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_the_package_and_the_card_templates_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}

    tracked = {path for folder in ("loram_hub", "model_cards") for path in (ROOT / folder).rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT).as_posix() for path in tracked if "__pycache__" not in path.parts}
    assert {n.removeprefix("loram_hub/") if n.startswith("loram_hub/model_cards/") else n for n in names} == expected
    assert {name.split("/")[0] for name in names} == {"loram_hub"}
    assert {"loram_hub/py.typed", "loram_hub/cli/__init__.py", "loram_hub/model_cards/README.md"} <= names


def test_the_wheel_states_name_licence_and_command(wheel: zipfile.ZipFile) -> None:
    info = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())

    assert metadata["Name"] == "loram-hub"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "loram = loram_hub.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_a_base_install_pulls_in_nothing_heavy(wheel: zipfile.ZipFile) -> None:
    info = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    required = {
        re.match(r"[\w.-]+", requirement)[0]
        for requirement in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in requirement
    }

    assert required == {"click", "filelock", "huggingface-hub", "ml-dtypes", "numpy", "safetensors"}


def test_constraints_hold_an_exact_version_of_everything_that_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")}
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {requirement.split(">")[0].split("[")[0].lower().replace("_", "-") for requirement in asked}

    assert names - {"loram-hub"} <= pinned
    assert len(names) > 15
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if pin.count("==") != 1 or "+" in pin] == []


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "bitsandbytes", "peft", "trl", "datasets", "accelerate"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{WITHOUT_TORCH}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_light_modules_import_where_torch_is_not_installed() -> None:
    run = run_without_torch("\n".join(f"import loram_hub.{module}" for module in LIGHT))

    assert run.returncode == 0, run.stderr


def test_light_functions_are_public_where_torch_is_not_installed() -> None:
    names = ["recover", "verify", "info", "count_parameters", "LoramError"]

    run = run_without_torch(f"import loram_hub\nprint([getattr(loram_hub, name).__name__ for name in {names}])")

    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(names)


def test_a_heavy_function_says_what_to_install_where_torch_is_not_installed() -> None:
    run = run_without_torch("import loram_hub\nloram_hub.prune")

    assert run.returncode == 1
    assert "MissingDependencyError" in run.stderr
    assert "loram-hub[publish]" in run.stderr


def test_loram_plan_works_where_torch_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,'
        ' "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 100}'
    )
    arguments = ["loram", "plan", str(tmp_path), "--pruning-ratio", "0.5", "--json"]

    run = run_without_torch(f"sys.argv = {arguments!r}\nfrom loram_hub.cli import main\nmain()")

    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["pruned_parameters"] == 271_936


def test_recipes_are_no_packages() -> None:
    for folder in ("publish", "consume", "model_cards"):
        assert (ROOT / folder / "README.md").is_file()
        assert list((ROOT / folder).rglob("__init__.py")) == []
