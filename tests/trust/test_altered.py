"""Every altered release and adapter is refused, each by a message of its own; the message is one printable line."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trust.adapter_corpus import ADAPTERS
from trust.alterations import Alter, Alteration, data, remove, sealed, write
from trust.corpus import RELEASES
from trust.subjects import SUBJECTS, build_subjects

from loram_hub.checkpoint import CONFIG, INDEX_FILE, SINGLE_FILE
from loram_hub.errors import IncompatibleError, LoramError, VerificationError
from loram_hub.inspection import verify
from loram_hub.manifest import MANIFEST

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CORPUS = (*RELEASES, *ADAPTERS)
LEAST_KINDS = 60
ERRORS = {3: VerificationError, 4: IncompatibleError}
THROUGH_THE_COMMAND = (
    "pickle added",
    "escape sequence in a file's name",
    "bottomless nesting",
    "newer format",
    "auto_map",
    "indices unsorted",
    "header beyond belief",
    "NaN in a norm",
    "NF4: block size 0",
    "adapter: DoRA",
    "adapter: NaN in a factor",
    "adapter: module to import",
)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound artefacts, to be copied."""
    folder = tmp_path_factory.mktemp("subjects")
    build_subjects(folder)
    return folder


def altered(subjects: Path, alteration: Alteration, target: Path) -> Path:
    folder = target / "altered"
    shutil.copytree(subjects / alteration.subject, folder)
    alteration.alter(folder)
    return folder


def base_for(subjects: Path, alteration: Alteration) -> Path | None:
    """Adapters are checked against their base; releases need none."""
    return subjects / "base" if alteration in ADAPTERS else None


def refusal(subjects: Path, alteration: Alteration, target: Path) -> LoramError:
    folder = altered(subjects, alteration, target)
    with pytest.raises(LoramError) as caught:
        verify(folder, base=base_for(subjects, alteration))
    return caught.value


@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_is_altered_was_sound_before(subjects: Path, subject: str) -> None:
    verify(subjects / subject, base=subjects / "base")


@pytest.mark.parametrize("alteration", CORPUS, ids=lambda alteration: alteration.kind)
def test_an_altered_artefact_is_refused(subjects: Path, alteration: Alteration, tmp_path: Path) -> None:
    error = refusal(subjects, alteration, tmp_path)

    assert error.exit_code == alteration.exit_code
    assert isinstance(error, ERRORS[alteration.exit_code])
    assert re.search(alteration.message, str(error)), str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize("corpus", [RELEASES, ADAPTERS], ids=["releases", "adapters"])
def test_every_kind_has_a_message_of_its_own(
    subjects: Path, corpus: tuple[Alteration, ...], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    found: dict[str, str] = {}
    for number, alteration in enumerate(corpus):
        folder = tmp_path / str(number)
        folder.mkdir()
        message = str(refusal(subjects, alteration, folder)).replace(str(folder), "")
        assert message not in found, f"{alteration.kind} and {found[message]} read alike: {message}"
        found[message] = alteration.kind
        shutil.rmtree(folder)

    assert len(found) == len(corpus)
    assert {alteration.exit_code for alteration in corpus} == {3, 4}
    figure(f"{len(corpus)} kinds of altered {'release' if corpus is RELEASES else 'adapter'}, all refused")


def test_there_are_as_many_kinds_as_were_promised() -> None:
    assert len(RELEASES) >= LEAST_KINDS
    assert len({alteration.kind for alteration in CORPUS}) == len(CORPUS)
    assert {alteration.subject for alteration in CORPUS} == set(SUBJECTS)
    assert set(THROUGH_THE_COMMAND) <= {alteration.kind for alteration in CORPUS}


@pytest.mark.parametrize("kind", THROUGH_THE_COMMAND)
def test_the_command_ends_with_the_exit_code_and_no_traceback(subjects: Path, kind: str, tmp_path: Path) -> None:
    alteration = next(each for each in CORPUS if each.kind == kind)
    folder = altered(subjects, alteration, tmp_path)
    base = base_for(subjects, alteration)

    run = subprocess.run(
        [sys.executable, "-m", "loram_hub", "verify", str(folder), *([] if base is None else ["--base", str(base)])],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )

    assert run.returncode == alteration.exit_code, run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith("Error: ")
    assert "Traceback" not in run.stderr
    assert "\x1b" not in run.stderr
    assert len(run.stderr.splitlines()) == 1


# Parsed, each of these takes many times the memory of its text: JSON of nothing but empty lists, up to what is read.
EMPTY_LISTS = b'{"a": [' + b"[]," * 4_000_000
BOMBS: dict[str, Alter] = {
    "manifest": data(MANIFEST, lambda _: EMPTY_LISTS[: 8 * 2**20 - 4] + b"0]}"),
    "config": sealed(data(CONFIG, lambda _: EMPTY_LISTS[: 8 * 2**20 - 4] + b"0]}")),
    "tokenizer's config": sealed(data("tokenizer_config.json", lambda _: EMPTY_LISTS[: 8 * 2**20 - 4] + b"0]}")),
    "index": sealed(remove(SINGLE_FILE), write(INDEX_FILE, EMPTY_LISTS[:8_388_001] + b"0]}")),
    "header": sealed(
        write(SINGLE_FILE, (8_388_004).to_bytes(8, "little") + EMPTY_LISTS[:8_388_001] + b"0]}" + b"\0" * 8)
    ),
    "keys": sealed(
        data(CONFIG, lambda _: b"{" + b"".join(b'"%d":0,' % number for number in range(700_000)) + b'"1":0,"1":0}')
    ),
}
LOWEST = """
import sys, time
from pathlib import Path
from loram_hub.errors import LoramError
from loram_hub.release import verify
start = time.monotonic()
try:
    verify(Path(sys.argv[1]))
except LoramError as err:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) * 1024, time.monotonic() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux")
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_cost_little_memory_and_time(subjects: Path, bomb: str, tmp_path: Path) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(subjects / "bf16", folder)
    BOMBS[bomb](folder)

    run = subprocess.run(
        [sys.executable, "-c", LOWEST, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[2],
    )

    peak, seconds = map(float, run.stdout.split())
    assert peak < 300e6
    assert seconds < 20
