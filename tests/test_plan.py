"""Counts of the paper to the unit, and every rule that kept indices must obey."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from loram_hub.architecture import Architecture, LayerSizes, Space, architecture_of
from loram_hub.errors import InvalidRequestError, PlanMismatchError
from loram_hub.plan import (
    Plan,
    PruningSettings,
    check_indices,
    nf4_bytes,
    parameter_counts,
    plan_from_scores,
    planned_sizes,
    pruned_layers,
)


def llama(hidden: int, channels: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> Architecture:
    return architecture_of(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": channels,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            **more,
        }
    )


LLAMA_2_13B = llama(5120, 13824, 40, 40, 40, 32_000)
LLAMA_2_70B = llama(8192, 28672, 80, 64, 8, 32_000)
LLAMA_3_70B = llama(8192, 28672, 80, 64, 8, 128_256)
TINY = llama(8, 10, 9, 6, 3, 50, head_dim=4)


# -- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "ratio", "before", "after"),
    [
        (LLAMA_2_13B, 0.65, 13_015_864_320, 6_005_662_720),
        (LLAMA_2_70B, 0.65, 68_976_648_192, 28_099_436_544),
        (LLAMA_2_70B, 0.75, 68_976_648_192, 21_488_738_304),
        (LLAMA_2_70B, 0.85, 68_976_648_192, 16_272_924_672),
        (LLAMA_2_70B, 0.95, 68_976_648_192, 9_662_226_432),
        (LLAMA_3_70B, 0.85, 70_553_706_496, 17_849_982_976),
    ],
)
def test_parameter_counts_are_the_papers_to_the_unit(
    architecture: Architecture, ratio: float, before: int, after: int
) -> None:
    counts = parameter_counts(architecture, planned_sizes(architecture, PruningSettings(pruning_ratio=ratio)))

    assert (counts.original_parameters, counts.pruned_parameters) == (before, after)
    assert counts.reduction == before / after
    assert counts.paper_reduction == 4 * before / after
    assert counts.bf16_bytes == 2 * after
    assert counts.paper_nf4_gib == after / 2 / 2**30


def test_llama_70b_at_085_takes_the_gib_that_the_design_states() -> None:
    counts = parameter_counts(LLAMA_3_70B, planned_sizes(LLAMA_3_70B, PruningSettings(pruning_ratio=0.85)))

    assert round(counts.paper_nf4_gib, 2) == 8.31
    assert round(counts.nf4_bytes / 2**30, 1) == 11.5
    assert counts.kept[:5] == (*[LayerSizes(kv_heads=8, channels=28672)] * 4, LayerSizes(kv_heads=2, channels=4300))
    assert counts.kept[-3:] == (LayerSizes(kv_heads=2, channels=4300), *[LayerSizes(kv_heads=8, channels=28672)] * 2)


def test_nf4_bytes_of_a_model_are_packed_projections_and_bf16_for_the_rest() -> None:
    counts = parameter_counts(TINY, [TINY.whole_layer] * 9)

    q, k, o, mlp = 24 * 8, 12 * 8, 8 * 24, 10 * 8
    projections = 9 * (nf4_bytes(q) + 2 * nf4_bytes(k) + nf4_bytes(o) + 3 * nf4_bytes(mlp))
    rest = 2 * 50 * 8 + (2 * 9 + 1) * 8
    assert counts.nf4_bytes == projections + 2 * rest


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (64, 64), (65, 63), (129, 127), (256, 300), (4300, 64)])
def test_nf4_bytes_of_a_matrix_are_those_that_bitsandbytes_holds(shape: tuple[int, int]) -> None:
    packed, state = bnb.quantize_4bit(torch.ones(shape), quant_type="nf4", compress_statistics=True)

    assert nf4_bytes(math.prod(shape)) == sum(t.nbytes for t in (packed, state.absmax, state.state2.absmax))


def test_counts_become_plain_json() -> None:
    counts = parameter_counts(TINY, planned_sizes(TINY, PruningSettings(pruning_ratio=0.5)))

    values = json.loads(json.dumps(counts.to_dict()))

    assert set(values) == {
        "original_parameters", "pruned_parameters", "reduction", "paper_reduction", "bf16_bytes", "nf4_bytes",
        "paper_nf4_gib", "kept",
    }  # fmt: skip
    assert values["kept"][3:5] == [
        {"layer": 3, "kv_heads": 3, "channels": 10},
        {"layer": 4, "kv_heads": 2, "channels": 5},
    ]
    assert len(values["kept"]) == 9


# -- sizes ------------------------------------------------------------------------------------------------------------


@given(
    ratio=st.floats(0, 1, exclude_max=True),
    kv_heads=st.integers(1, 16),
    head_dim=st.integers(1, 128),
    channels=st.integers(1, 5000),
    round_to=st.none() | st.integers(1, 300),
)
def test_sizes_follow_the_formulas(
    ratio: float, kv_heads: int, head_dim: int, channels: int, round_to: int | None
) -> None:
    architecture = llama(8, channels, 7, 2 * kv_heads, kv_heads, 50, head_dim=head_dim)
    settings = PruningSettings(pruning_ratio=ratio, round_to=round_to)
    kv_channels = kv_heads * head_dim
    heads_kept = kv_heads - (kv_channels - int(kv_channels * (1 - ratio))) // head_dim
    channels_kept = int(channels * (1 - ratio))
    if round_to is not None:
        channels_kept = next(n for n in range(channels_kept, channels_kept + round_to) if n % round_to == 0)
        channels_kept = min(channels_kept, channels)
    assume(heads_kept >= 1)
    assume(channels_kept >= 1)

    sizes = planned_sizes(architecture, settings)

    assert sizes[4] == LayerSizes(kv_heads=heads_kept, channels=channels_kept)
    assert sizes[:4] + sizes[5:] == (architecture.whole_layer,) * 6


@given(ratio=st.floats(0, 0.98), channels=st.integers(200, 60_000))
def test_channels_kept_are_the_exact_share_to_within_one(ratio: float, channels: int) -> None:
    architecture = llama(8, channels, 7, 100, 100, 50, head_dim=1)

    kept = planned_sizes(architecture, PruningSettings(pruning_ratio=ratio))[4].channels

    assert abs(math.floor(channels * (1 - Fraction(ratio))) - kept) <= 1


def test_the_share_is_taken_in_floats_as_the_paper_takes_it() -> None:
    """1 - 0.9 is a little under 0.1, so 99 of 1000 channels stay; the paper's counts come from the same arithmetic."""
    architecture = llama(8, 1000, 7, 20, 10, 50, head_dim=4)

    sizes = planned_sizes(architecture, PruningSettings(pruning_ratio=0.9))

    assert sizes[4] == LayerSizes(kv_heads=1, channels=99)


@pytest.mark.parametrize(("round_to", "channels"), [(None, 35), (1, 35), (8, 40), (64, 64), (70, 70), (128, 100)])
def test_rounding_goes_up_to_a_multiple_but_not_beyond_the_whole(round_to: int | None, channels: int) -> None:
    architecture = llama(8, 100, 7, 4, 4, 50)

    sizes = planned_sizes(architecture, PruningSettings(pruning_ratio=0.65, round_to=round_to))

    assert sizes[4].channels == channels


def test_ratio_zero_keeps_everything() -> None:
    assert planned_sizes(TINY, PruningSettings(pruning_ratio=0)) == (TINY.whole_layer,) * 9


@pytest.mark.parametrize("ratio", [-0.01, 1, 1.0, 1.2, math.nan, math.inf, -math.inf])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"must lie in \[0, 1\)"):
        PruningSettings(pruning_ratio=ratio)


@pytest.mark.parametrize(
    ("field", "value"), [("keep_first", -1), ("keep_last", -1), ("round_to", 0), ("round_to", -64)]
)
def test_other_settings_outside_their_range_are_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        PruningSettings(pruning_ratio=0.5, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "message"), [(0.95, r"leaves 0 of 3 KV heads and 0 of 10 MLP"), (0.9, r"and 0 of 10 MLP channels")]
)
def test_a_ratio_that_empties_a_layer_is_refused(ratio: float, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        planned_sizes(TINY, PruningSettings(pruning_ratio=ratio))


@pytest.mark.parametrize(("first", "last"), [(4, 5), (9, 0), (0, 9), (40, 2)])
def test_whole_layers_that_leave_none_to_prune_are_refused(first: int, last: int) -> None:
    with pytest.raises(InvalidRequestError, match="leave none of the 9 layers"):
        pruned_layers(TINY, PruningSettings(pruning_ratio=0.5, keep_first=first, keep_last=last))


def test_all_layers_are_pruned_when_none_is_to_stay_whole() -> None:
    assert pruned_layers(TINY, PruningSettings(pruning_ratio=0.5, keep_first=0, keep_last=0)) == range(9)


# -- from scores to a plan --------------------------------------------------------------------------------------------

Scores = dict[int, dict[Space, npt.NDArray[np.float32]]]
HALF = PruningSettings(pruning_ratio=0.5)  # keeps 2 of TINY's 3 KV heads and 5 of its 10 channels in layers 4 to 6


def tiny_scores(kv_heads: list[float] | None = None, channels: list[float] | None = None) -> Scores:
    heads = np.array(kv_heads or [1, 2, 3], dtype=np.float32)
    rest = np.array(channels or range(10), dtype=np.float32)
    return {layer: {"kv_heads": heads, "channels": rest} for layer in (4, 5, 6)}


def test_the_most_important_groups_are_kept_in_ascending_order() -> None:
    plan = plan_from_scores(TINY, HALF, tiny_scores([3, 1, 2], [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]))

    assert sorted(plan.kept) == [4, 5, 6]
    for spaces in plan.kept.values():
        assert spaces["kv_heads"].tolist() == [0, 2]
        assert spaces["channels"].tolist() == [1, 3, 5, 7, 9]
        assert {spaces["kv_heads"].dtype, spaces["channels"].dtype} == {np.dtype(np.int32)}


def test_equal_scores_are_settled_by_the_lower_index() -> None:
    plan = plan_from_scores(TINY, HALF, tiny_scores([5, 5, 5], [1, 0, 1, 0, 1, 1, 1, 1, 1, 1]))

    assert plan.kept[4]["kv_heads"].tolist() == [0, 1]
    assert plan.kept[4]["channels"].tolist() == [0, 2, 4, 5, 6]


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.5]), min_size=400, max_size=400))
def test_ties_are_settled_by_index_in_layers_of_real_width_too(channels: list[float]) -> None:
    """NumPy's default sort is stable only for a handful of values."""
    architecture = llama(8, 400, 7, 2, 2, 50)
    heads = np.array([1, 2], dtype=np.float32)
    scores: Scores = {4: {"kv_heads": heads, "channels": np.array(channels, dtype=np.float32)}}

    plan = plan_from_scores(architecture, HALF, scores)

    by_hand = sorted(range(400), key=lambda channel: (-channels[channel], channel))[:200]
    assert plan.kept[4]["channels"].tolist() == sorted(by_hand)


@given(st.lists(st.floats(-100, 100, width=32), min_size=10, max_size=10))
def test_no_pruned_group_scores_higher_than_a_kept_one(channels: list[float]) -> None:
    plan = plan_from_scores(TINY, HALF, tiny_scores(channels=channels))

    kept = plan.kept[5]["channels"]
    pruned = np.setdiff1d(np.arange(10), kept)
    values = np.array(channels, dtype=np.float32)
    assert len(kept) == 5
    assert values[kept].min() >= values[pruned].max()


@pytest.mark.parametrize(
    "bad",
    [
        np.arange(9, dtype=np.float32),
        np.zeros((1, 10), dtype=np.float32),
        np.array([*range(9), np.nan], dtype=np.float32),
        np.array([*range(9), np.inf], dtype=np.float32),
    ],
)
def test_scores_of_the_wrong_shape_or_not_finite_are_refused(bad: npt.NDArray[np.float32]) -> None:
    scores = tiny_scores()
    scores[5] = {**scores[5], "channels": bad}

    with pytest.raises(PlanMismatchError, match="Importance of layer 5 channels must be 10 finite numbers"):
        plan_from_scores(TINY, HALF, scores)


def test_a_missing_layer_of_scores_is_refused() -> None:
    scores = tiny_scores()
    del scores[6]

    with pytest.raises(PlanMismatchError, match="Importance of layer 6"):
        plan_from_scores(TINY, HALF, scores)


def test_a_missing_kind_of_scores_is_refused() -> None:
    scores = tiny_scores()
    del scores[6]["channels"]

    with pytest.raises(PlanMismatchError, match="Importance of layer 6 channels"):
        plan_from_scores(TINY, HALF, scores)


# -- indices and plans ------------------------------------------------------------------------------------------------


def indices(*values: int, dtype: Any = np.int32) -> npt.NDArray[Any]:
    return np.array(values, dtype=dtype)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (indices(0, 1, dtype=np.int64), "is int64 with 1 axes"),
        (indices(0, 1, dtype=np.uint32), "is uint32"),
        (indices(0, 1, dtype=np.float32), "is float32"),
        (np.zeros((1, 1), dtype=np.int32), "int32 with 2 axes"),
        (np.array(3, dtype=np.int32), "int32 with 0 axes"),
        (indices(), "keeps nothing"),
        (indices(-1, 2), "runs from -1 to 2"),
        (indices(0, 10), r"within \[0, 10\); it runs from 0 to 10"),
        (indices(3, 3), "strictly ascending"),
        (indices(0, 2, 1), "strictly ascending"),
        (indices(5, -(2**31), 6), "strictly ascending"),
        (indices(2**31 - 1), "it runs from 2147483647"),
    ],
)
def test_indices_that_break_a_rule_are_refused(bad: npt.NDArray[Any], message: str) -> None:
    with pytest.raises(PlanMismatchError, match=message) as caught:
        check_indices(bad, 10, name="layer 3 channels")

    assert "layer 3 channels" in str(caught.value)


@given(st.lists(st.integers(-3, 12), max_size=8))
def test_exactly_the_ascending_unique_indices_within_range_pass(values: list[int]) -> None:
    sound = bool(values) and values == sorted(set(values)) and values[0] >= 0 and values[-1] < 10

    if sound:
        check_indices(indices(*values), 10, name="x")
    else:
        with pytest.raises(PlanMismatchError):
            check_indices(indices(*values), 10, name="x")


def tiny_plan(**changes: Any) -> Plan:
    spaces = {"kv_heads": indices(0, 2), "channels": indices(1, 3, 5, 7)} | changes
    return Plan(TINY, {4: spaces, 6: {"kv_heads": indices(1), "channels": indices(*range(10))}})


@pytest.mark.parametrize("layer", [-1, 9, 10**6])
def test_a_plan_for_a_layer_that_the_model_lacks_is_refused(layer: int) -> None:
    with pytest.raises(PlanMismatchError, match=f"prunes layer {layer}; the base model has 9"):
        Plan(TINY, {layer: {"kv_heads": indices(0), "channels": indices(0)}})


def test_a_plan_with_half_a_layer_is_refused() -> None:
    with pytest.raises(PlanMismatchError, match="Layer 2 of the plan lists"):
        Plan(TINY, {2: {"kv_heads": indices(0)}})


def test_a_plan_with_an_index_beyond_its_own_space_is_refused() -> None:
    with pytest.raises(PlanMismatchError, match="layer 4 kv_heads"):
        tiny_plan(kv_heads=indices(0, 3))


def test_shapes_come_from_the_kept_indices_layer_by_layer() -> None:
    plan = tiny_plan()

    assert plan.layers[3:7] == (
        TINY.whole_layer,
        LayerSizes(kv_heads=2, channels=4),
        TINY.whole_layer,
        LayerSizes(kv_heads=1, channels=10),
    )
    shapes = plan.tensor_shapes()
    assert shapes["model.layers.4.self_attn.q_proj.weight"] == (16, 8)
    assert shapes["model.layers.4.self_attn.k_proj.weight"] == (8, 8)
    assert shapes["model.layers.4.self_attn.o_proj.weight"] == (8, 16)
    assert shapes["model.layers.4.mlp.down_proj.weight"] == (8, 4)
    assert shapes["model.layers.6.self_attn.q_proj.weight"] == (8, 8)
    assert shapes["model.layers.5.mlp.up_proj.weight"] == (10, 8)


def test_kept_positions_are_given_per_axis_of_a_tensor() -> None:
    plan = tiny_plan()

    rows, columns = plan.kept_on_axes("model.layers.4.self_attn.k_proj.weight")
    assert rows is not None
    assert rows.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert columns is None
    rows, columns = plan.kept_on_axes("model.layers.4.mlp.down_proj.weight")
    assert rows is None
    assert columns is not None
    assert columns.tolist() == [1, 3, 5, 7]
    assert plan.kept_on_axes("model.layers.5.mlp.down_proj.weight") == (None, None)
    assert plan.kept_on_axes("model.layers.4.input_layernorm.weight") == (None,)
    assert plan.kept_on_axes("model.embed_tokens.weight") == ()
    with pytest.raises(PlanMismatchError):
        plan.kept_on_axes("model.layers.4.mlp.experts.0.weight")


def test_the_digest_tells_any_two_plans_apart_and_only_those() -> None:
    digests = {
        tiny_plan().digest,
        tiny_plan(channels=indices(1, 3, 5, 8)).digest,
        tiny_plan(channels=indices(1, 3, 5)).digest,
        tiny_plan(kv_heads=indices(0, 1)).digest,
        Plan(TINY, {5: tiny_plan().kept[4], 6: tiny_plan().kept[6]}).digest,
        Plan(TINY, {}).digest,
    }

    assert len(digests) == 6
    reordered = Plan(TINY, dict(reversed(tiny_plan().kept.items())))
    assert reordered.digest == tiny_plan().digest


def test_the_digest_is_that_of_docs_format() -> None:
    """Releases carry it, so it must never change."""
    pieces = (
        *(b"4.kv_heads.2;", b"\0\0\0\0", b"\2\0\0\0"),
        *(b"4.channels.4;", b"\1\0\0\0", b"\3\0\0\0", b"\5\0\0\0", b"\7\0\0\0"),
        *(b"6.kv_heads.1;", b"\1\0\0\0"),
        *(b"6.channels.10;", b"".join(i.to_bytes(4, "little") for i in range(10))),
    )

    assert tiny_plan().digest == hashlib.sha256(b"".join(pieces)).hexdigest()
