"""Targets from a streamed base against the whole model; resuming, sharing among processes, reading back, refusing."""

from __future__ import annotations

import json
import random
import shutil
import string
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import save_base, save_tokenizer, tiny_config
from click.testing import CliRunner
from filelock import FileLock
from killed import bytes_of, run_killed
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram_hub.architecture import FAMILIES
from loram_hub.checkpoint import Checkpoint
from loram_hub.cli import main
from loram_hub.corpora import Corpus, PackedStream
from loram_hub.errors import (
    CheckpointError,
    IncompatibleError,
    InvalidRequestError,
    LoramError,
    ResourceError,
    UnsupportedModelError,
    VerificationError,
)
from loram_hub.files import dump_json
from loram_hub.seals import seal
from loram_hub.teaching import TeacherShards, TeachingSettings, check_teach, teach, teacher_bytes

SETTINGS = TeachingSettings(k=7, sequences=21, sequence_length=16, held_out=2, block_sequences=8, batch_size=4)
SHARDS = ["teacher-00000.safetensors", "teacher-00001.safetensors", "teacher-00002.safetensors"]


def base_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    sliding = {"sliding_window": 8} if family.startswith("gemma") else {}
    return save_tokenizer(save_base(folder, tiny_config(family, layers=3, **sliding, **changes)))


def write_corpus(path: Path, *, seed: int = 0, documents: int = 600) -> Corpus:
    rng = random.Random(seed)
    texts = [" ".join(f"w{rng.randrange(4, 53)}" for _ in range(rng.randrange(3, 30))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Corpus(source=str(path))


def in_letters(file: Path) -> None:
    """Write letters for the words w4, w5, ... of a tokenizer or corpus: transformers gives a Qwen2 one its own rules,
    which take texts apart into bytes.
    """
    text = file.read_text(encoding="utf-8")
    for number, letter in reversed(list(enumerate(string.ascii_letters[:49], start=4))):
        text = text.replace(f"w{number}", letter)
    file.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("corpora")
    return [
        replace(write_corpus(folder / "one.jsonl"), weight=0.5),
        replace(write_corpus(folder / "two.jsonl", seed=1), weight=0.25),
    ]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, base: Path, corpora: list[Corpus]) -> TeacherShards:
    """A finished run; tests leave it as it is."""
    shards = teach(base, tmp_path_factory.mktemp("taught") / "out", corpora=corpora, settings=SETTINGS)
    assert shards is not None
    return shards


def stream_of(base: Path, corpora: list[Corpus], settings: TeachingSettings = SETTINGS) -> PackedStream:
    return PackedStream(
        corpora,
        AutoTokenizer.from_pretrained(base),
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        held_out=settings.held_out,
        shuffle_window=settings.shuffle_window,
    )


def whole_model_log_probs(base: Path, tokens: np.ndarray) -> np.ndarray:
    """The reference: the whole model in one forward pass, log-softmax over the whole vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits
    return logits.double().log_softmax(-1).numpy()


def assert_equal_to_whole_model(base: Path, shards: TeacherShards) -> None:
    tokens = shards.tokens(0, shards.sequences)
    expected = whole_model_log_probs(base, tokens)
    token_ids, log_probs = shards.targets(0, shards.sequences)

    assert token_ids.shape == log_probs.shape == (*tokens.shape, shards.k)
    assert (token_ids.dtype, log_probs.dtype) == (np.int32, np.float16)
    chosen = np.take_along_axis(expected, token_ids, -1)
    # Not the ids themselves: which of two tokens comes first can hang on the last bit of a logit.
    np.testing.assert_allclose(chosen, -np.sort(-expected, axis=-1)[..., : shards.k], rtol=0, atol=2e-5)
    assert (np.diff(np.sort(token_ids, axis=-1), axis=-1) > 0).all()
    np.testing.assert_allclose(log_probs, chosen, rtol=2**-10, atol=2e-5)
    assert (np.diff(log_probs.astype(np.float32), axis=-1) <= 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_equal_the_whole_models_in_every_family(tmp_path: Path, family: str) -> None:
    base = base_model(tmp_path / "base", family)
    corpus = write_corpus(tmp_path / "texts.jsonl")
    if family == "qwen2":
        in_letters(base / "tokenizer.json")
        in_letters(corpus.path)

    shards = teach(base, tmp_path / "out", corpora=[corpus], settings=SETTINGS)

    assert shards is not None
    assert len(np.unique(shards.tokens(0, 21))) > 40
    assert_equal_to_whole_model(base, shards)


def test_targets_of_a_tied_and_of_a_16_bit_base_equal_the_whole_models(tmp_path: Path, corpora: list[Corpus]) -> None:
    tied = base_model(tmp_path / "tied", tie_word_embeddings=True)
    bf16 = save_tokenizer(save_base(tmp_path / "bf16", tiny_config(layers=3), dtype="bfloat16"))

    for base in (tied, bf16):
        shards = teach(base, tmp_path / f"{base.name}-out", corpora=corpora, settings=SETTINGS)
        assert shards is not None
        assert_equal_to_whole_model(base, shards)


def test_logits_are_taken_in_chunks_that_fit_memory(
    tmp_path: Path, base: Path, corpora: list[Corpus], taught: TeacherShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loram_hub.teaching.outputs._LOGITS", 53 * 5)

    teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS)

    assert_equal_to_whole_model(base, TeacherShards.open(tmp_path / "out"))


def test_of_equally_probable_tokens_the_lower_id_comes_first(tmp_path: Path, corpora: list[Corpus]) -> None:
    base = base_model(tmp_path / "base")
    alike = load_file(base / "model.safetensors")
    alike["lm_head.weight"][:] = alike["lm_head.weight"][0]
    save_file(alike, base / "model.safetensors", metadata={"format": "pt"})

    shards = teach(base, tmp_path / "out", corpora=corpora, settings=replace(SETTINGS, k=53))

    assert shards is not None
    token_ids, log_probs = shards.targets(0, 21)
    assert (token_ids == np.arange(53)).all()
    np.testing.assert_allclose(log_probs, -np.log(53), rtol=1e-3)


def test_the_sequences_are_the_first_of_the_training_stream(
    base: Path, corpora: list[Corpus], taught: TeacherShards
) -> None:
    stream = stream_of(base, corpora)

    expected = np.stack([next(stream).ids for _ in range(21)])

    np.testing.assert_array_equal(taught.tokens(0, 21), expected)
    assert taught.record.stream_digest == stream.stream_digest


@pytest.mark.parametrize("block_sequences", [4, 12, 64])
def test_the_size_of_blocks_does_not_change_a_bit_of_the_targets(
    tmp_path: Path, base: Path, corpora: list[Corpus], taught: TeacherShards, block_sequences: int
) -> None:
    settings = replace(SETTINGS, block_sequences=block_sequences)

    shards = teach(base, tmp_path / "out", corpora=corpora, settings=settings)

    assert shards is not None
    assert len(shards.record.shards) == -(-21 // block_sequences)
    for found, expected in zip(shards.targets(0, 21), taught.targets(0, 21), strict=True):
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_processes_share_the_blocks_and_the_last_one_seals(
    tmp_path: Path,
    base: Path,
    corpora: list[Corpus],
    taught: TeacherShards,
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[int, int],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    results, written = [], []
    for rank in order:
        monkeypatch.setenv("RANK", str(rank))
        results.append(teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS))
        written.append({path.name for path in (tmp_path / "out").glob("teacher-*")})

    assert written[0] == {name for block, name in enumerate(SHARDS) if block % 2 == order[0]}
    assert results[0] is None
    assert results[1] is not None
    assert bytes_of(tmp_path / "out") == bytes_of(taught.folder)


def test_rows_are_read_across_shards(taught: TeacherShards) -> None:
    every_id, every_probability = taught.targets(0, 21)
    tokens = taught.tokens(0, 21)

    for first, count in [(0, 1), (7, 2), (8, 8), (3, 18), (20, 1)]:
        ids, probabilities = taught.targets(first, count)
        np.testing.assert_array_equal(ids, every_id[first : first + count])
        np.testing.assert_array_equal(probabilities, every_probability[first : first + count])
        np.testing.assert_array_equal(taught.tokens(first, count), tokens[first : first + count])


def test_a_rerun_computes_what_is_missing_or_damaged_and_nothing_else(
    tmp_path: Path, base: Path, corpora: list[Corpus], taught: TeacherShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(taught.folder, tmp_path / "out"))
    (out / "teacher.json").unlink()
    (out / SHARDS[0]).unlink()
    damaged = bytearray((out / SHARDS[2]).read_bytes())
    damaged[-5] ^= 1
    (out / SHARDS[2]).write_bytes(damaged)
    kept = (out / SHARDS[1]).stat().st_mtime_ns

    teach(base, out, corpora=corpora, settings=SETTINGS)

    assert bytes_of(out) == bytes_of(taught.folder)
    assert (out / SHARDS[1]).stat().st_mtime_ns == kept
    monkeypatch.setattr(Checkpoint, "read", refuse_but_once())
    assert teach(base, out, corpora=corpora, settings=SETTINGS) is not None  # finished: not a layer is read


def refuse_but_once() -> Callable[[Checkpoint, str], torch.Tensor]:
    """`Checkpoint.read` for the one look at the stored type, an error afterwards."""
    read, names = Checkpoint.read, []

    def count(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        names.append(name)
        assert len(names) == 1, names
        return read(checkpoint, name)

    return count


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, base: Path, corpora: list[Corpus]
) -> None:
    settings = replace(SETTINGS, sequences=60, block_sequences=4)

    killed = run_killed(
        "import transformers.models.llama.modeling_llama, datasets.packaged_modules.json.json\n"
        "from loram_hub.teaching import teach, TeachingSettings\n"
        "from loram_hub.corpora import Corpus",
        "teach(base, out, corpora=[Corpus(**c) for c in corpora], settings=TeachingSettings(**settings))",
        kills=8,
        base=str(base),
        corpora=[asdict(corpus) for corpus in corpora],
        settings=asdict(settings),
        out=str(tmp_path / "out"),
    )

    assert killed >= 2  # the later ones find ever less to do
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 15
    leftover = {name for name in bytes_of(tmp_path / "out") if name.startswith(".")}
    assert bytes_of(tmp_path / "out", but=sorted(leftover)) == bytes_of(tmp_path / "out-timed")


def test_a_run_that_was_killed_before_it_began_one_starts_anew(
    tmp_path: Path, base: Path, corpora: list[Corpus], taught: TeacherShards
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".teaching.json.0.part").write_text("{", encoding="utf-8")
    (tmp_path / "out" / ".rank-0.lock").touch()

    teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS)

    assert bytes_of(tmp_path / "out") == bytes_of(taught.folder)


def test_a_run_goes_on_only_with_the_same_base_settings_and_texts(
    tmp_path: Path, base: Path, taught: TeacherShards
) -> None:
    mine = [write_corpus(tmp_path / "mine.jsonl")]
    teach(base, tmp_path / "out", corpora=mine, settings=SETTINGS)
    (tmp_path / "out" / SHARDS[0]).unlink()
    other_base = base_model(tmp_path / "other", rms_norm_eps=1e-5)

    for settings, corpora, model, differs in [
        (replace(SETTINGS, k=6), mine, base, "k"),
        (replace(SETTINGS, seed=1), mine, base, "seed"),
        (replace(SETTINGS, dtype="bfloat16"), mine, base, "dtype, compute_type"),
        (SETTINGS, [write_corpus(tmp_path / "other.jsonl")], base, "corpora"),
        (SETTINGS, mine, other_base, "base.config_sha256, base.id"),
    ]:
        with pytest.raises(IncompatibleError, match=f"these differ: {differs}"):
            teach(model, tmp_path / "out", corpora=corpora, settings=settings)
    write_corpus(tmp_path / "mine.jsonl", seed=2)
    with pytest.raises(IncompatibleError, match="texts or the tokenizer have changed"):
        teach(base, tmp_path / "out", corpora=mine, settings=SETTINGS)

    with pytest.raises(IncompatibleError, match="texts or the tokenizer have changed"):
        check_teach(base, tmp_path / "out", corpora=mine, settings=SETTINGS)

    done = teach(base, tmp_path / "out", corpora=mine, settings=replace(SETTINGS, k=6), overwrite=True)

    assert done is not None
    assert done.k == 6


def test_targets_of_texts_that_have_changed_since_are_not_returned(tmp_path: Path, base: Path) -> None:
    mine = [write_corpus(tmp_path / "mine.jsonl")]
    first = teach(base, tmp_path / "out", corpora=mine, settings=SETTINGS)
    write_corpus(tmp_path / "mine.jsonl", seed=2)

    with pytest.raises(IncompatibleError, match="texts or the tokenizer have changed"):
        teach(base, tmp_path / "out", corpora=mine, settings=SETTINGS)

    again = teach(base, tmp_path / "out", corpora=mine, settings=SETTINGS, overwrite=True)
    assert first is not None
    assert again is not None
    assert again.record.stream_digest == stream_of(base, mine).stream_digest != first.record.stream_digest


def test_a_local_base_is_told_by_its_weights(tmp_path: Path, corpora: list[Corpus]) -> None:
    base = base_model(tmp_path / "base")
    first = teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS)
    tuned = load_file(base / "model.safetensors")
    tuned["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5  # neither at the head nor at the tail of the file
    save_file(tuned, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(IncompatibleError, match=r"these differ: base\.weights_sha256\."):
        teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS)

    again = teach(base, tmp_path / "again", corpora=corpora, settings=SETTINGS)
    assert first is not None
    assert again is not None
    assert first.digest != again.digest


def test_the_digest_covers_the_targets_themselves(taught: TeacherShards) -> None:
    (shard, *others) = taught.record.shards
    altered = replace(taught.record, shards=(replace(shard, sha256="0" * 64), *others))

    assert altered.digest != taught.digest == taught.record.digest
    assert altered.run_digest == taught.record.run_digest
    moved = replace(taught.record, requested=(), corpora=())
    assert moved.digest == taught.digest


def test_a_process_that_finds_the_run_just_begun_by_another_joins_it(
    tmp_path: Path, base: Path, corpora: list[Corpus], taught: TeacherShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process begins right after this one has seen that nothing was begun."""
    from loram_hub.teaching import teaching

    look, out = teaching._may_go_on, tmp_path / "out"

    def look_and_be_overtaken(*args: Any) -> bool:
        found = look(*args)
        if not out.exists():
            with monkeypatch.context() as other:
                other.setattr(teaching, "_may_go_on", look)
                other.setenv("RANK", "0")
                assert teach(base, out, corpora=corpora, settings=SETTINGS) is None
        return found

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(teaching, "_may_go_on", look_and_be_overtaken)

    assert teach(base, out, corpora=corpora, settings=SETTINGS) is not None
    assert bytes_of(out) == bytes_of(taught.folder)


def test_a_folder_of_something_else_is_kept_unless_it_may_be_overwritten(
    tmp_path: Path, base: Path, corpora: list[Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()

    for call in (teach, check_teach):
        with pytest.raises(InvalidRequestError, match="already exists"):
            call(base, out, corpora=corpora, settings=SETTINGS)
    with monkeypatch.context() as environment:
        environment.setenv("RANK", "0")
        environment.setenv("WORLD_SIZE", "2")
        with pytest.raises(InvalidRequestError, match="Delete it first"):
            teach(base, out, corpora=corpora, settings=SETTINGS, overwrite=True)
    assert (out / "mine").exists()
    teach(base, out, corpora=corpora, settings=SETTINGS, overwrite=True)
    assert not (out / "mine").exists()


def test_check_teach_says_what_it_takes_and_writes_nothing(tmp_path: Path, base: Path, corpora: list[Corpus]) -> None:
    found = check_teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS)

    assert (found.sequences, found.tokens, found.blocks) == (21, 21 * 16, 3)
    assert found.nbytes == 21 * 16 * (7 * 6 + 4) == teacher_bytes(21, 16, 7)
    assert found.weight_bytes == 3 * sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    assert found.hidden_bytes == 8 * 16 * 24 * 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--steps", "--batch-size"])
def test_a_command_for_no_steps_is_refused_and_not_taken_for_the_default(
    tmp_path: Path, base: Path, corpora: list[Corpus], option: str
) -> None:
    arguments = ["teach", str(base), str(tmp_path / "out"), "--corpus", corpora[0].source, option, "0", "--dry-run"]

    result = CliRunner().invoke(main, arguments)

    assert isinstance(result.exception, SystemExit | LoramError), result.output
    assert "sequences is 0" in result.output + str(result.exception)


def test_of_several_processes_the_first_one_prints(
    tmp_path: Path, base: Path, corpora: list[Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("{k: 3, sequences: 16, sequence_length: 16, held_out: 2, block_sequences: 8}", encoding="utf-8")
    arguments = ["teach", str(base), str(tmp_path / "out"), "--corpus", corpora[0].source, "--settings", str(settings)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    printed = []
    for rank, more in [("1", ["--dry-run"]), ("0", ["--json"]), ("1", []), ("0", ["--json"])]:
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(main, [*arguments, *more])
        assert result.exit_code == 0, result.output
        printed.append(result.stdout)

    assert [printed[0], printed[2]] == ["", ""]
    assert [json.loads(printed[number])["finished"] for number in (1, 3)] == [False, True]


def test_shards_have_the_size_that_was_told_but_for_their_headers(taught: TeacherShards) -> None:
    nbytes = sum(entry.size for entry in taught.record.shards)

    assert 0 < nbytes - teacher_bytes(21, 16, 7) < 3 * 1000


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"stream_digest": "0" * 64}, r"one\.jsonl=0\.5, .*two\.jsonl=0\.25 in sequences of 16 tokens, seed 0"),
        ({"sequence_length": 32}, "sequences of 16 tokens, the training's have 32"),
        ({"sequences": 22}, "targets of 21 sequences, the training takes 22"),
    ],
)
def test_targets_of_another_stream_are_refused_with_what_differs(
    taught: TeacherShards, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(IncompatibleError, match=message):
        TeacherShards.open(taught.folder, **asked)
    TeacherShards.open(
        taught.folder, stream_digest=taught.record.stream_digest, sequence_length=16, sequences=21
    ).check_hashes()


@pytest.mark.parametrize(("first", "count"), [(0, 22), (21, 1), (-1, 2), (0, 0)])
def test_sequences_beyond_the_last_are_refused(taught: TeacherShards, first: int, count: int) -> None:
    for read in (taught.targets, taught.tokens):
        with pytest.raises(InvalidRequestError, match="targets of 21 sequences"):
            read(first, count)


def alter(name: str, change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """Change a shard's tensors and keep its size."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        (folder / name).write_bytes(with_tensors(folder / name, tensors))

    return apply


def with_tensors(path: Path, tensors: dict[str, np.ndarray]) -> bytes:
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    body = bytearray(data[length:])
    for name, tensor in tensors.items():
        start, end = header[name]["data_offsets"]
        body[start:end] = tensor.tobytes()
    return data[:length] + bytes(body)


def put(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][1, 2] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("token_ids", 53),
        put("token_ids", -1),
        put("log_probs", np.nan),
        put("log_probs", -np.inf),
        put("log_probs", 0.5),
        put("log_probs", -0.1),
        put("tokens", 53),
    ],
    ids=["id too high", "id negative", "NaN", "infinity", "above one", "sum above one", "token too high"],
)
def test_values_that_no_teacher_gives_are_refused_when_they_are_read(
    tmp_path: Path, taught: TeacherShards, change: Callable[[dict[str, np.ndarray]], None]
) -> None:
    folder = Path(shutil.copytree(taught.folder, tmp_path / "out"))
    alter(SHARDS[1], change)(folder)

    opened = TeacherShards.open(folder)

    opened.targets(0, 8)
    with pytest.raises(VerificationError, match="is damaged"):
        (opened.targets(9, 1), opened.tokens(9, 1))
    with pytest.raises(VerificationError, match="another SHA-256"):
        opened.check_hashes()


def rewrite(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
    del values["sha256"]
    (folder / "teacher.json").write_text(seal(values | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / "teacher.json").unlink(), CheckpointError, "is not finished"),
        (lambda folder: shutil.rmtree(folder), CheckpointError, "holds no targets"),
        (lambda folder: (folder / SHARDS[1]).unlink(), CheckpointError, "missing or not"),
        (lambda folder: (folder / SHARDS[1]).write_bytes(b"short"), CheckpointError, "missing or not"),
        (lambda folder: (folder / SHARDS[0]).write_bytes(b"\xff" * 6000), LoramError, "teacher-00000"),
        (lambda folder: rewrite(folder, format=2), VerificationError, "format 1"),
        (lambda folder: rewrite(folder, settings={"k": 0}), VerificationError, "does not describe"),
        (lambda folder: rewrite(folder, more=1), VerificationError, "does not describe"),
        (lambda folder: rewrite(folder, settings={**asdict(SETTINGS), "k": 8}), VerificationError, "holds"),
        (lambda folder: (folder / "teacher.json").write_text(dump_json({"k": 1})), VerificationError, "sha256"),
    ],
)
def test_a_folder_that_is_unfinished_or_damaged_is_refused(
    tmp_path: Path, taught: TeacherShards, damage: Callable[[Path], object], error: type[LoramError], message: str
) -> None:
    folder = Path(shutil.copytree(taught.folder, tmp_path / "out"))
    damage(folder)

    with pytest.raises(error, match=message):
        TeacherShards.open(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 0},
        {"sequences": 0},
        {"sequence_length": 1},
        {"seed": -1},
        {"held_out": True},
        {"shuffle_window": 0},
        {"batch_size": 0},
        {"repeat": "yes"},
        {"dtype": "float16"},
        {"block_sequences": 9},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        TeachingSettings(**wrong)


def test_more_tokens_than_the_vocabulary_has_are_refused(tmp_path: Path, base: Path, corpora: list[Corpus]) -> None:
    with pytest.raises(InvalidRequestError, match="k is 54, the vocabulary of base has 53"):
        check_teach(base, tmp_path / "out", corpora=corpora, settings=replace(SETTINGS, k=54))


def test_a_corpus_that_runs_out_keeps_the_shards_that_are_done(tmp_path: Path, base: Path) -> None:
    corpora = [write_corpus(tmp_path / "few.jsonl", documents=20)]

    with pytest.raises(InvalidRequestError, match=r"few\.jsonl"):
        teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS)

    assert (tmp_path / "out" / SHARDS[0]).is_file()
    with pytest.raises(InvalidRequestError, match="tokens at the most"):
        check_teach(base, tmp_path / "out", corpora=corpora, settings=replace(SETTINGS, sequences=10**6))
    repeated = teach(base, tmp_path / "again", corpora=corpora, settings=replace(SETTINGS, repeat=True))
    assert repeated is not None


def test_a_base_that_is_no_base_is_refused(tmp_path: Path, corpora: list[Corpus]) -> None:
    without = save_base(tmp_path / "without", tiny_config(layers=2))
    quantized = base_model(tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text(encoding="utf-8"))
    (quantized / "config.json").write_text(dump_json({**config, "quantization_config": {"quant_method": "gptq"}}))

    with pytest.raises(CheckpointError, match="no tokenizer"):
        teach(without, tmp_path / "out", corpora=corpora, settings=SETTINGS)
    with pytest.raises(UnsupportedModelError, match="quantized"):
        teach(quantized, tmp_path / "out", corpora=corpora, settings=SETTINGS)


def test_logits_that_are_no_numbers_stop_the_teacher(tmp_path: Path, corpora: list[Corpus]) -> None:
    base = base_model(tmp_path / "base")
    damaged = load_file(base / "model.safetensors")
    damaged["model.norm.weight"][0] = np.inf
    save_file(damaged, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(VerificationError, match="not finite"):
        teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS)


def test_a_disk_that_cannot_hold_the_targets_is_told_before_anything_is_computed(
    tmp_path: Path, base: Path, corpora: list[Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))

    with pytest.raises(ResourceError, match=r"another 15,456 bytes, .* has 1,000 left"):
        teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS)


def test_two_runs_of_one_rank_do_not_mix(tmp_path: Path, base: Path, corpora: list[Corpus]) -> None:
    (tmp_path / "out").mkdir()

    with (
        FileLock(tmp_path / "out" / ".rank-0.lock"),
        pytest.raises(ResourceError, match="Another process is writing"),
    ):
        teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS)


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}],
)
def test_half_a_launchers_environment_is_refused(
    tmp_path: Path,
    base: Path,
    corpora: list[Corpus],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(InvalidRequestError, match="WORLD_SIZE"):
        teach(base, tmp_path / "out", corpora=corpora, settings=SETTINGS)
