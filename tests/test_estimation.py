"""Estimates against sums done by hand, and against what tiny models really take."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from base_configs import BASES
from builders import tiny_architecture
from hypothesis import given, settings
from hypothesis import strategies as st

from loram_hub.architecture import Architecture, architecture_of
from loram_hub.errors import InvalidRequestError, UnsupportedAdapterError
from loram_hub.estimation import (
    AlignmentShape,
    Hardware,
    MemoryOptions,
    Reserves,
    TrainingShape,
    activation_bytes,
    align_cost,
    evaluate_cost,
    largest_settings,
    largest_that_fits,
    model_size,
    prune_cost,
    quantize_cost,
    refit_cost,
    smallest_ratio,
    teach_cost,
    training_memory,
)
from loram_hub.pipeline import read_recipe
from loram_hub.pipeline.preview import stage_costs
from loram_hub.plan import PruningSettings, parameter_counts, planned_sizes
from loram_hub.teaching.settings import teacher_bytes

H100 = Hardware(gpu="H100", count=8, memory_gib=80, tflops=989, price_per_gpu_hour=2.5)
SHAPE = AlignmentShape(
    tokens=1600 * 128 * 512,
    sequence_length=512,
    micro_batch_size=4,
    loss_chunk=1024,
    precision="mixed",
    activation_checkpointing=True,
    checkpoints=16,
    evaluated_tokens=17 * 2 * 32 * 512,
    keep_checkpoints=2,
    processes=8,
)


def llama_70b() -> Architecture:
    return architecture_of(BASES["meta-llama/Llama-2-70b-hf"][0])


@pytest.mark.parametrize("base", BASES)
def test_sizes_are_those_that_are_known_of_each_base(base: str) -> None:
    config, parameters = BASES[base]

    assert model_size(architecture_of(config)).parameters == parameters


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "phi3", "olmo2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_the_sum_of_its_parts(model_type: str, tied: bool) -> None:
    architecture = tiny_architecture(model_type, tie_word_embeddings=tied)
    sizes = planned_sizes(architecture, PruningSettings(pruning_ratio=0.4, keep_first=1, keep_last=1))

    found = model_size(architecture, sizes)

    shapes = architecture.tensor_shapes(sizes)
    assert found.parameters == sum(math.prod(shape) for shape in shapes.values())
    assert found.parameters == sum(found.layers) + found.embedding + found.head + architecture.hidden_size
    assert found.head == (0 if tied else found.embedding)
    assert found.active == found.parameters - found.head
    assert found.largest_tensor == max(math.prod(shape) for shape in shapes.values())
    assert found.nf4_bytes == parameter_counts(architecture, sizes).nf4_bytes


def test_aligning_the_papers_70b_takes_what_the_formulas_say() -> None:
    architecture = llama_70b()
    pruned = model_size(architecture, planned_sizes(architecture, PruningSettings(pruning_ratio=0.85)))

    cost = align_cost(pruned, SHAPE, state_bytes=10**10, checkpoint_bytes=2 * 10**11)

    multiplied = 16_272_924_672 - 32_000 * 8192  # the embedding is looked up
    held_out = 17 * 2 * 32 * 512  # before the first step and after every hundredth, of both corpora
    assert cost.flops == 8 * multiplied * 104_857_600 + 2 * multiplied * held_out
    assert cost.scratch_bytes == 3 * 2 * 10**11
    assert cost.output_bytes == 2 * 16_272_924_672
    assert cost.memory_bytes == 10**10 + activation_bytes(pruned, SHAPE)
    checkpoints = 16 * 2 * 2e11 / 1e9  # each is written and read again to be hashed, at 1 GB/s
    seconds = cost.flops / (8 * 989e12 * 0.4) + checkpoints + 2 * cost.output_bytes / 1e9
    assert cost.seconds(H100) == pytest.approx(seconds, rel=1e-12)
    assert H100.price(seconds) == pytest.approx(seconds / 3600 * 8 * 2.5)
    without = align_cost(pruned, replace(SHAPE, activation_checkpointing=False), state_bytes=0, checkpoint_bytes=0)
    assert cost.flops - without.flops == 2 * multiplied * 104_857_600


def test_training_stands_still_while_checkpoints_are_written_and_hashed() -> None:
    """The time of the recipe for the paper's 70B, worked out by hand."""
    recipe = read_recipe(Path(__file__).parents[1] / "publish" / "llama-2-70b.yaml")
    assert recipe.hardware is not None

    seconds = stage_costs(recipe, llama_70b())["align"].seconds(recipe.hardware)

    training = 4243.8  # 8 * 16,010,780,672 * 104,857,600 operations; 8 GPUs of 989e12 a second, 40 % of it
    held_out = 5.6  # 2 * 16,010,780,672 * 557,056
    checkpoints = 1562.2  # 4, of 12 * 16,272,924,672 bytes, written and read, 1 GB a second
    weights = 65.1  # 2 * 16,272,924,672 bytes, read and written
    assert seconds == pytest.approx(training + held_out + checkpoints + weights, abs=0.5)
    assert recipe.align is not None
    often = replace(recipe.align, settings=replace(recipe.align.settings, save_every=100))
    slower = stage_costs(replace(recipe, align=often), llama_70b())["align"].seconds(recipe.hardware)
    assert slower - seconds == pytest.approx(3 * checkpoints, abs=0.5)


def test_a_model_is_spread_over_the_gpus_of_one_node() -> None:
    recipe = read_recipe(Path(__file__).parents[1] / "publish" / "llama-2-70b.yaml")
    assert recipe.hardware is not None
    two_nodes = replace(recipe.hardware, count=16, gpus_per_node=8)

    one, two = (
        stage_costs(replace(recipe, hardware=machine), llama_70b())["evaluate"]
        for machine in (recipe.hardware, two_nodes)
    )

    assert one.memory_bytes == two.memory_bytes == 2 * 68_976_648_192 // 8


def test_activations_are_counted_by_token_layer_and_chunk() -> None:
    pruned = model_size(tiny_architecture(layers=3))
    shape = replace(SHAPE, sequence_length=16, micro_batch_size=2, loss_chunk=8, precision="fp32")

    kept = activation_bytes(pruned, shape)
    whole = activation_bytes(pruned, replace(shape, activation_checkpointing=False))

    layer = 4 * (4 * 24 + 3 * 60 + 3 * 30 + 4 * 37) + 8 * 24
    logits = 8 * 53 * 16
    assert kept == 32 * (3 * 4 * 24 + layer) + logits
    assert whole == 32 * 3 * layer + logits


def test_streaming_steps_wait_for_the_slower_of_disk_and_arithmetic() -> None:
    base = model_size(llama_70b())
    pruned = model_size(llama_70b(), planned_sizes(llama_70b(), PruningSettings(pruning_ratio=0.85)))

    taylor = prune_cost(base, pruned, method="taylor", tokens=4096)
    assert taylor.disk_bytes == 3 * base.bytes_16 + pruned.bytes_16
    assert taylor.flops == 8 * base.active * 4096
    assert taylor.seconds(H100) == pytest.approx(taylor.disk_bytes / 1e9)
    slow = replace(H100, tflops=0.5)
    assert taylor.seconds(slow) == pytest.approx(taylor.flops / (0.5e12 * 0.4))
    assert prune_cost(base, pruned, method="random", tokens=4096).disk_bytes == base.bytes_16 + pruned.bytes_16
    assert prune_cost(base, pruned, method="random", tokens=4096).flops == 0
    assert refit_cost(base, pruned, tokens=8192).flops > 2 * (base.active + pruned.active) * 8192


def test_a_teacher_reads_the_base_once_for_each_block_and_writes_what_its_shards_hold() -> None:
    base = model_size(llama_70b())

    cost = teach_cost(base, sequences=1000, sequence_length=512, k=64, block_sequences=300, gpus=8)

    assert cost.output_bytes == teacher_bytes(1000, 512, 64)
    assert cost.disk_bytes == 4 * base.bytes_16 + cost.output_bytes
    assert cost.flops == 2 * base.active * 512_000


def test_evaluation_holds_one_model_at_a_time_spread_over_gpus() -> None:
    base, pruned = model_size(llama_70b()), model_size(tiny_architecture())

    cost = evaluate_cost([(base, base.bytes_16), (pruned, pruned.nf4_bytes)], tokens=1000, spread=8)

    assert cost.memory_bytes == base.bytes_16 // 8
    assert cost.flops == 2 * (base.active + pruned.active) * 1000


def test_quantizing_writes_nf4() -> None:
    pruned = model_size(tiny_architecture())

    assert quantize_cost(pruned).output_bytes == pruned.nf4_bytes < pruned.bytes_16


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 0},
        {"gpus_per_node": 9},
        {"utilization": 1.5},
        {"utilization": 0.0},
        {"tflops": math.nan},
        {"price_per_gpu_hour": -1.0},
    ],
)
def test_a_machine_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(changes))):
        replace(H100, **changes)


GIB = 2**30
UNTIED = sorted(name for name, (config, _) in BASES.items() if not config["tie_word_embeddings"])
SHAPES_TO_TRAIN = st.builds(
    TrainingShape,
    sequence_length=st.integers(16, 5000),
    micro_batch=st.integers(1, 8),
    rank=st.integers(1, 128),
    targets=st.sampled_from([None, ("q_proj", "v_proj"), ("down_proj",)]),
    dropout=st.sampled_from([0.0, 0.05]),
    optimizer=st.sampled_from(["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]),
    checkpointing=st.booleans(),
    options=st.builds(
        MemoryOptions,
        embedding=st.sampled_from(["device", "cpu", "int8"]),
        lm_head=st.sampled_from(["device", "int8", "nf4"]),
        activation_offloading=st.booleans(),
    ),
    processes=st.integers(1, 2),
)


@settings(max_examples=40)
@given(base=st.sampled_from(UNTIED), shape=SHAPES_TO_TRAIN, gib=st.integers(4, 96), quantized=st.booleans())
def test_what_is_solved_for_fits_and_the_next_does_not(
    base: str, shape: TrainingShape, gib: int, quantized: bool
) -> None:
    architecture = architecture_of(BASES[base][0])
    layers = planned_sizes(architecture, PruningSettings(pruning_ratio=0.85))

    def fits(changed: TrainingShape) -> bool:
        return training_memory(architecture, layers, changed, quantized=quantized).total <= gib * GIB

    found = largest_settings(architecture, layers, shape, gib * GIB, quantized=quantized)

    for name in ("sequence_length", "micro_batch", "rank"):
        most: int | None = getattr(found, name)
        there: dict[str, Any] = {name: most or 1}
        beyond: dict[str, Any] = {name: (most or 0) + 1}
        assert fits(replace(shape, **there)) == (most is not None)
        assert not fits(replace(shape, **beyond))


@settings(max_examples=25)
@given(
    base=st.sampled_from(UNTIED), shape=SHAPES_TO_TRAIN, gib=st.integers(2, 96), round_to=st.sampled_from([None, 64])
)
def test_the_smallest_ratio_fits_and_a_thousandth_less_does_not(
    base: str, shape: TrainingShape, gib: int, round_to: int | None
) -> None:
    architecture = architecture_of(BASES[base][0])

    def fits(ratio: float) -> bool:
        sizes = planned_sizes(architecture, PruningSettings(pruning_ratio=ratio, round_to=round_to))
        return training_memory(architecture, sizes, shape).total <= gib * GIB

    found = smallest_ratio(architecture, shape, gib * GIB, round_to=round_to)

    if found is None:
        assert not all(map(fits, (0.85, 0.9, 0.95)))
    else:
        assert fits(found)
        assert found == 0 or not fits(round(found - 0.001, 3))


LARGE_FACTORS = ("rank", 60)
"""Ranks at which factors of a 13B model pass 100,000 elements, one size after the other."""


@pytest.mark.parametrize(
    ("optimizer", "setting", "last"),
    [
        ("paged_adamw_8bit", *LARGE_FACTORS),
        ("adamw_8bit", *LARGE_FACTORS),
        ("adamw_torch", "rank", 20),
        ("paged_adamw_8bit", "micro_batch", 20),
        ("paged_adamw_8bit", "sequence_length", 20),
    ],
)
def test_everything_up_to_the_border_fits_whatever_the_moments_do(optimizer: Any, setting: str, last: int) -> None:
    """Every value is tried, against budgets that lie right at, and right below, what each of them takes."""
    architecture = architecture_of(BASES["meta-llama/Llama-2-13b-hf"][0])
    layers = planned_sizes(architecture, PruningSettings(pruning_ratio=0.65))
    shape = TrainingShape(optimizer=optimizer)
    changes: list[dict[str, Any]] = [{setting: value} for value in range(1, last + 1)]
    totals = [training_memory(architecture, layers, replace(shape, **each)).total for each in changes]

    for budget in (total - less for total in totals[:: last // 5] for less in (0, 1)):
        fitting = [total <= budget for total in totals]
        if all(fitting):
            continue  # the border lies beyond what was tried
        expected = fitting.index(False) or None
        assert getattr(largest_settings(architecture, layers, shape, budget), setting) == expected
    has_gaps = any(later < earlier for earlier, later in pairwise(totals))
    assert has_gaps == (setting == "rank" and optimizer == "paged_adamw_8bit")


@pytest.mark.parametrize("round_to", [None, 64])
def test_every_ratio_from_the_border_on_fits_whatever_the_moments_do(round_to: int | None) -> None:
    architecture = architecture_of(BASES["meta-llama/Llama-3.1-8B"][0])
    shape = TrainingShape(rank=16)
    totals = {}
    for thousandths in range(875, -1, -1):  # at 0.876 no KV head is left
        sizes = planned_sizes(architecture, PruningSettings(pruning_ratio=thousandths / 1000, round_to=round_to))
        totals[thousandths / 1000] = training_memory(architecture, sizes, shape).total

    for budget in list(totals.values())[7::100]:
        expected = None
        for ratio, total in totals.items():
            if total > budget:
                break
            expected = ratio
        assert smallest_ratio(architecture, shape, budget, round_to=round_to) == expected
    assert any(larger < smaller for smaller, larger in pairwise(totals.values()))  # the moments do something


def test_lora_on_the_lm_head_is_refused() -> None:
    architecture = architecture_of(BASES["meta-llama/Llama-3.1-8B"][0])
    layers = [architecture.whole_layer] * architecture.num_hidden_layers

    with pytest.raises(UnsupportedAdapterError, match="never be trained"):
        training_memory(architecture, layers, TrainingShape(targets=("q_proj", "lm_head")))


def test_a_base_of_too_few_layers_for_the_plan_has_a_ratio_only_if_it_fits_as_it_is() -> None:
    architecture = tiny_architecture(layers=4)

    assert smallest_ratio(architecture, TrainingShape(), 10 * GIB) == 0
    assert smallest_ratio(architecture, TrainingShape(), 1000) is None


@pytest.mark.parametrize("border", [0, 1, 2, 3, 17, 64, 99, 100, 101])
def test_the_border_is_found_wherever_it_is(border: int) -> None:
    tried: list[int] = []

    def fits(value: int) -> bool:
        tried.append(value)
        return value <= border

    assert largest_that_fits(fits, limit=100) == (min(border, 100) or None)
    assert max(tried) <= 100


def test_more_of_anything_takes_more_and_every_option_takes_less() -> None:
    architecture = architecture_of(BASES["meta-llama/Llama-3.1-70B"][0])
    layers = planned_sizes(architecture, PruningSettings(pruning_ratio=0.85))
    shape = TrainingShape(micro_batch=4, reserves=Reserves(context_bytes=0, fragmentation=0))

    def total(**changes: Any) -> int:
        return training_memory(architecture, layers, replace(shape, **changes)).total

    for changes in (
        {"sequence_length": 513},
        {"micro_batch": 5},
        {"rank": 9},
        {"processes": 2},
        {"checkpointing": False},
    ):
        assert total(**changes) > total()
    for changes in ({"dropout": 0.0}, {"targets": ("q_proj",)}, {"padded": False}):
        assert total(**changes) < total()
    words, hidden = 128_256, 8192
    assert total() - total(options=MemoryOptions(embedding="cpu")) == 2 * words * hidden
    assert total() - total(options=MemoryOptions(lm_head="int8")) == words * hidden - 4 * words
    inputs = 80 * 2 * 4 * 512 * hidden
    assert total() - total(options=MemoryOptions(activation_offloading=True)) == inputs - inputs * 5 // 80
    reserved = total(reserves=Reserves(context_bytes=1000, fragmentation=0))
    assert reserved - total() == 1000


def test_only_large_moments_are_paged_out() -> None:
    """Of rank 8: 65,536 elements stay, 229,376 go to main memory with their scales left behind."""
    architecture = architecture_of(BASES["meta-llama/Llama-2-70b-hf"][0])
    layers = [architecture.whole_layer]

    def moments(target: str, optimizer: str) -> int:
        shape = TrainingShape(targets=(target,), optimizer=optimizer)  # type: ignore[arg-type]
        return training_memory(architecture, layers, shape).optimizer

    assert moments("o_proj", "paged_adamw_8bit") == moments("o_proj", "adamw_8bit")
    saved = moments("down_proj", "adamw_8bit") - moments("down_proj", "paged_adamw_8bit")
    assert saved == 2 * 8 * 28_672
