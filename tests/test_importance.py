"""Streamed importance against a plain full-model backward, with heads and channels credited by explicit loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import HEADS, save_base, tiny_config
from transformers import AutoModelForCausalLM

from loram_hub.architecture import FAMILIES, Architecture, architecture_of
from loram_hub.checkpoint import Checkpoint
from loram_hub.errors import InvalidRequestError
from loram_hub.importance import VARIANTS, Scores, importance_scores, parse_importance

SAMPLES, TOKENS = 5, 20


def base_model(folder: Path, family: str = "llama", **changes: object) -> Path:
    sliding = {"sliding_window": 8} if family.startswith("gemma") else {}
    return save_base(folder, tiny_config(family, **sliding, **changes))


def calibration(architecture: Architecture, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, architecture.vocab_size, (SAMPLES, TOKENS), generator=generator)


def streamed(folder: Path, importance: str, **options: object) -> Scores:
    with Checkpoint(folder) as checkpoint:
        architecture = architecture_of(checkpoint.config)
        layers = options.pop("layers", range(architecture.num_hidden_layers))
        options.setdefault("calibration", calibration(architecture))
        return importance_scores(checkpoint, architecture, layers, importance=parse_importance(importance), **options)


class FullBackward:
    """The reference: the whole model in memory, one backward per sample, scores by loops over heads and channels."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.architecture = architecture_of(self.model.config.to_dict())
        ids = calibration(self.architecture)
        self.gradient: dict[str, torch.Tensor] = {}
        self.fisher: dict[str, torch.Tensor] = {}
        for sample in ids.split(1):
            self.model.zero_grad()
            self.model(input_ids=sample, labels=sample).loss.backward()
            for name, parameter in self.model.named_parameters():
                own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                self.gradient[name] = self.gradient.get(name, 0) + own / SAMPLES
                self.fisher[name] = self.fisher.get(name, 0) + own**2 / SAMPLES

    def elements(self, name: str, variant: str) -> torch.Tensor:
        weight, gradient, fisher = self.model.get_parameter(name).data, self.gradient[name], self.fisher[name]
        return {
            "param_first": (weight * gradient).abs(),
            "vectorize": weight * gradient,
            "param_second": (weight * fisher * weight).abs(),
            "param_mix": (weight * gradient - 0.5 * weight * fisher * weight).abs(),
        }[variant]

    def lines(self, layer: int, module: str, dim: int, variant: str) -> torch.Tensor:
        """One number per output (dim 0) or input (dim 1) channel of a linear layer."""
        sums = self.elements(f"model.layers.{layer}.{module}.weight", variant).sum(dim=1 - dim)
        return sums.abs() if variant == "vectorize" else sums

    def projections(self, layer: int, variant: str) -> dict[str, torch.Tensor]:
        a = self.architecture
        if a.family.model_type == "phi3":
            q_size, kv_size = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
            q, k, v = self.lines(layer, "self_attn.qkv_proj", 0, variant).split([q_size, kv_size, kv_size])
            gate, up = self.lines(layer, "mlp.gate_up_proj", 0, variant).chunk(2)
        else:
            q, k, v = (self.lines(layer, f"self_attn.{n}_proj", 0, variant) for n in "qkv")
            gate, up = (self.lines(layer, f"mlp.{n}_proj", 0, variant) for n in ("gate", "up"))
        o = self.lines(layer, "self_attn.o_proj", 1, variant)
        down = self.lines(layer, "mlp.down_proj", 1, variant)
        return {"q": q, "k": k, "v": v, "o": o, "gate": gate, "up": up, "down": down}

    def scores(self, layer: int, variant: str) -> tuple[list[float], list[float]]:
        a, p, d = self.architecture, self.projections(layer, variant), self.architecture.head_dim
        heads = [0.0] * a.num_key_value_heads
        for query_head in range(a.num_attention_heads):
            owner = query_head * a.num_key_value_heads // a.num_attention_heads
            rows = slice(query_head * d, query_head * d + d)
            heads[owner] += float(p["q"][rows].sum() + p["o"][rows].sum())
        for head in range(a.num_key_value_heads):
            rows = slice(head * d, head * d + d)
            heads[head] += float(p["k"][rows].sum() + p["v"][rows].sum())
        channels = [float(p["gate"][c] + p["up"][c] + p["down"][c]) for c in range(a.intermediate_size)]
        return heads, channels


def assert_equal_to_full_backward(folder: Path, variant: str, **options: object) -> None:
    found = streamed(folder, f"taylor:{variant}", **options)
    reference = FullBackward(folder)

    assert list(found) == list(range(reference.architecture.num_hidden_layers))
    for layer, scores in found.items():
        heads, channels = reference.scores(layer, variant)
        # A `vectorize` line is a sum of terms that nearly cancel: its error is relative to the terms, not to the sum.
        slack = 1e-5 * max(channels) if variant == "vectorize" else 0
        np.testing.assert_allclose(scores["kv_heads"], heads, rtol=1e-5, atol=slack)
        np.testing.assert_allclose(scores["channels"], channels, rtol=1e-5, atol=slack)
        assert scores["kv_heads"].dtype == scores["channels"].dtype == np.float32
        assert min(channels) > 0


@pytest.mark.parametrize("variant", VARIANTS["taylor"])
@pytest.mark.parametrize("layout", HEADS)
def test_streamed_taylor_equals_a_full_backward(tmp_path: Path, layout: str, variant: str) -> None:
    base = base_model(tmp_path / "base", attention=layout)

    assert_equal_to_full_backward(base, variant)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_taylor_equals_a_full_backward_in_every_family(tmp_path: Path, family: str) -> None:
    base = base_model(tmp_path / "base", family)

    assert_equal_to_full_backward(base, "param_first")


def test_streamed_taylor_reads_the_tied_embedding_where_there_is_no_lm_head(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama", tie_word_embeddings=True)

    assert_equal_to_full_backward(base, "param_first")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_checkpoints_are_scored_in_fp32_on_the_cpu(tmp_path: Path, dtype: str) -> None:
    base = save_base(tmp_path / "base", tiny_config(), dtype=dtype)

    assert_equal_to_full_backward(base, "param_first")


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batch_size_does_not_change_the_scores(tmp_path: Path, batch_size: int) -> None:
    base = base_model(tmp_path / "base", "llama")

    assert_equal_to_full_backward(base, "param_first", batch_size=batch_size)


def test_gradients_add_up_in_fp32_when_the_model_computes_in_bf16(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama")
    exact = streamed(base, "taylor")

    found = streamed(base, "taylor", dtype=torch.bfloat16, batch_size=1)

    for layer, scores in found.items():
        assert scores["channels"].dtype == np.float32
        np.testing.assert_allclose(scores["channels"], exact[layer]["channels"], rtol=0.2)
        assert not np.array_equal(scores["channels"], exact[layer]["channels"])


def test_only_the_layers_asked_for_are_scored_and_alike(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama", layers=4)
    everything = streamed(base, "taylor")

    found = streamed(base, "taylor", layers=[1, 2])

    assert list(found) == [1, 2]
    for layer, scores in found.items():
        np.testing.assert_array_equal(scores["channels"], everything[layer]["channels"])


@pytest.mark.parametrize("salient", range(8))
def test_a_query_head_counts_for_the_kv_head_that_serves_it(tmp_path: Path, salient: int) -> None:
    base = base_model(tmp_path / "base", "llama", num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
        layer.self_attn.q_proj.weight.data[salient * 4 : salient * 4 + 4] = 100.0
    model.save_pretrained(base)

    scores = streamed(base, "magnitude:l1")

    for layer in scores.values():
        assert int(layer["kv_heads"].argmax()) == salient // 4


@pytest.mark.parametrize(("variant", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_sums_the_powers_of_a_groups_weights(tmp_path: Path, variant: str, power: int) -> None:
    base = base_model(tmp_path / "base", "llama", num_attention_heads=4, num_key_value_heads=2)
    layers = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False).model.layers

    found = streamed(base, f"magnitude:{variant}")

    for number, layer in enumerate(layers):
        mlp, attention = layer.mlp, layer.self_attn
        d = attention.head_dim
        lines = (mlp.gate_proj.weight[3], mlp.up_proj.weight[3], mlp.down_proj.weight[:, 3])
        channel = sum(float((line.abs() ** power).sum()) for line in lines)
        members = (
            attention.q_proj.weight[2 * d : 4 * d],
            attention.k_proj.weight[d : 2 * d],
            attention.v_proj.weight[d : 2 * d],
            attention.o_proj.weight[:, 2 * d : 4 * d],
        )
        head = sum(float((w.abs() ** power).sum()) for w in members)
        assert found[number]["channels"][3] == pytest.approx(channel, rel=1e-5)
        assert found[number]["kv_heads"][1] == pytest.approx(head, rel=1e-5)


def test_random_scores_depend_on_the_seed_and_the_layer_alone(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "llama", layers=3)

    first, again, other = (streamed(base, "random", seed=seed) for seed in (7, 7, 8))
    alone = streamed(base, "random", seed=7, layers=[2])

    np.testing.assert_array_equal(first[2]["channels"], again[2]["channels"])
    np.testing.assert_array_equal(first[2]["channels"], alone[2]["channels"])
    assert not np.array_equal(first[2]["channels"], other[2]["channels"])
    assert not np.array_equal(first[1]["channels"], first[2]["channels"])


def test_unknown_methods_and_variants_are_refused_with_the_known_ones() -> None:
    for text in ("tailor", "taylor:param_third", "magnitude:l3", "random:l1", ""):
        with pytest.raises(InvalidRequestError, match="taylor:param_mix"):
            parse_importance(text)


@pytest.mark.parametrize(
    "ids",
    [
        None,
        torch.zeros(0, 8, dtype=torch.long),
        torch.zeros(3, 1, dtype=torch.long),
        torch.zeros(8, dtype=torch.long),
        torch.zeros(2, 8),
        torch.full((2, 8), 10**6),
        torch.full((2, 8), -1),
    ],
    ids=["none", "no samples", "one token", "one axis", "floats", "beyond the vocabulary", "negative"],
)
def test_unusable_calibration_is_refused(tmp_path: Path, ids: torch.Tensor | None) -> None:
    base = base_model(tmp_path / "base", "llama")

    with pytest.raises(InvalidRequestError, match=r"[Cc]alibration"):
        streamed(base, "taylor", calibration=ids)
