"""Masked LoRA on sparse releases: the product and its gradients, inside PEFT's layers, whatever surrounds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import save_base, sparse_config, sparse_release, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from loram_hub import AutoLoramModel, mask_lora_
from loram_hub.errors import (
    IncompatibleError,
    InvalidRequestError,
    PlanMismatchError,
    UnsupportedAdapterError,
    VerificationError,
)
from loram_hub.masked_lora import MaskedLayer, is_masked
from loram_hub.masked_lora.product import KeptWeights, MaskedUpdate, masked_product
from loram_hub.masks import MaskFile
from loram_hub.pruning import prune

CPU = torch.device("cpu")
IDS = torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(5))
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error by type, in parts of the largest number; bfloat16 has 8 bits, and sums of a dozen of them."""


def random_mask(rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.random.default_rng(rows * columns).random((rows, columns)) < 0.5


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for shape in shapes:
        yield torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("columns", [24, 11], ids=["whole bytes", "padded rows"])
def test_a_mask_is_the_same_after_packing(columns: int) -> None:
    mask = random_mask(7, columns)
    dense = torch.full((7, columns), torch.inf)

    kept = KeptWeights(mask)

    assert np.array_equal(kept(CPU).numpy(), mask)
    assert kept(torch.device("meta")).shape == (7, columns)
    assert kept.bits.device == CPU  # replicas on other devices share it
    assert kept.bits.nbytes == 7 * -(-columns // 8)
    assert np.array_equal(kept.zero_pruned_(dense).numpy(), np.where(mask, np.inf, 0))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
def test_product_and_gradients_are_those_of_a_dense_computation(
    dtype: torch.dtype, with_weight: bool, dropped: bool
) -> None:
    mask = random_mask(13, 11)
    x, A, B, W, g = tensors((2, 5, 11), (3, 11), (13, 3), (13, 11), (2, 5, 13))
    x, W, g = x.to(dtype), (W * torch.from_numpy(mask)).to(dtype), g.to(dtype)
    inputs = torch.tensor([0.0, *[1.5] * 9, 0.0]) if dropped else None
    variables = x, A, B = x.requires_grad_(), A.requires_grad_(), B.requires_grad_()
    update = MaskedUpdate(
        kept=KeptWeights(mask), scale=0.7, inputs=inputs, weight=(lambda to: W.to(to)) if with_weight else None
    )

    y = masked_product(x, A, B, update)
    found = [y, *torch.autograd.grad(y, variables, g)]

    x, A, B = references = [each.detach().double().requires_grad_() for each in variables]
    dense = 0.7 * (B @ (A if inputs is None else A * inputs)) * torch.from_numpy(mask)
    y = functional.linear(x, dense + W.double() if with_weight else dense)
    expected = [y, *torch.autograd.grad(y, references, g.double())]
    assert y.dtype == torch.float64
    assert [each.dtype for each in found] == [dtype, dtype, torch.float64, torch.float64]
    assert max(map(error, found, expected)) < EXACT[dtype]


def test_gradients_pass_a_numerical_check() -> None:
    x, A, B, W = (each.requires_grad_() for each in tensors((4, 5), (2, 5), (6, 2), (6, 5)))
    update = MaskedUpdate(kept=KeptWeights(random_mask(6, 5)), scale=1.3, weight=lambda _: W.detach())

    assert torch.autograd.gradcheck(lambda x, A, B: masked_product(x, A, B, update), (x, A, B))


def test_nothing_is_learnt_from_pruned_weights() -> None:
    mask = random_mask(8, 16)
    mask[3], mask[:, 5] = False, False
    x, A, B = (each.requires_grad_() for each in tensors((4, 16), (2, 16), (8, 2)))

    masked_product(x, A, B, MaskedUpdate(kept=KeptWeights(mask), scale=1.0)).sum().backward()

    assert A.grad is not None
    assert B.grad is not None
    assert torch.equal(A.grad.ne(0).all(dim=0), torch.arange(16) != 5)
    assert torch.equal(B.grad.ne(0).all(dim=1), torch.arange(8) != 3)


def test_a_small_update_is_not_rounded_away_in_16_bit() -> None:
    small = 2.0**-12  # far below half a unit in the last place of 1, so that 1 + small is 1 in bfloat16
    x, W = torch.tensor([[1.0, -1.0]]).bfloat16(), torch.ones(1, 2).bfloat16()
    A, B = torch.tensor([[small, -small]]), torch.ones(1, 1)
    update = MaskedUpdate(kept=KeptWeights(np.ones((1, 2), np.bool_)), scale=1.0, weight=W.to)

    assert masked_product(x, A, B, update).item() == 2 * small


def test_the_gradient_of_inputs_in_16_bit_is_as_exact_as_from_two_products() -> None:
    mask = random_mask(256, 192)
    W, A, B, g = tensors((256, 192), (8, 192), (256, 8), (64, 256))
    W, g = (W * torch.from_numpy(mask) * 0.05).bfloat16(), g.bfloat16()
    A, B = A * 0.02, B * 0.02  # an update of a hundredth of the weights
    x = torch.zeros(64, 192, dtype=torch.bfloat16, requires_grad=True)
    update = MaskedUpdate(kept=KeptWeights(mask), scale=2.0, weight=W.to)

    (once,) = torch.autograd.grad(masked_product(x, A, B, update), x, g)

    dense = 2 * (B @ A) * torch.from_numpy(mask)
    twice = g @ W + g @ dense.bfloat16()
    expected = g.double() @ (W.double() + dense)
    assert (once.double() - expected).norm() < 1.1 * (twice.double() - expected).norm()


class Alive(TorchDispatchMode):
    """Count the largest number of tensors of a size that were alive at one time, and the bytes of all that were."""

    def __init__(self, numel: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel, self.most, self.peak, self._seen = numel, 0, 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            is_dense = made.is_floating_point() and made.numel() == self.numel
            self._seen[made] = (made.data_ptr(), made.untyped_storage().nbytes(), is_dense)
        alive = set(self._seen.values())
        self.most = max(self.most, sum(is_dense for _, _, is_dense in alive))
        self.peak = max(self.peak, sum({place: nbytes for place, nbytes, _ in alive}.values()))
        return made


@pytest.mark.parametrize(
    ("dtype", "has_weight", "forward", "backward"),
    [
        # At hand in the type: the update, and 1.5 bytes of its mask. Else (NF4, autocast) the weight beside it; but the
        # forward pass in 16 bit has one after the other.
        (torch.float32, True, (1, 5.5), (1, 5.5)),
        (torch.bfloat16, True, (1, 3.5), (1, 3.5)),
        (torch.float32, False, (2, 8), (2, 8)),
        (torch.bfloat16, False, (1, 3.5), (2, 4)),
    ],
    ids=["fp32", "bf16", "NF4 in fp32", "NF4 in bf16"],
)
def test_what_is_alive_at_a_time_is_of_one_layer(
    dtype: torch.dtype, has_weight: bool, forward: tuple[int, float], backward: tuple[int, float]
) -> None:
    size = 256
    mask = random_mask(size, size)
    x, A, B, W = (each.requires_grad_() for each in tensors((3, size), (2, size), (size, 2), (size, size), dtype=dtype))
    frozen, M = W.detach(), torch.from_numpy(mask)
    codes = frozen.to(torch.float16)  # stands for whatever the weight is made from
    update = MaskedUpdate(
        kept=KeptWeights(mask), scale=1.0, weight=lambda to: frozen if has_weight else codes.to(to, copy=True)
    )

    def alive(product: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple[int, float]]:
        with Alive(size * size) as in_forward:
            y = product(product(product(x)))
        with Alive(size * size) as in_backward:
            y.sum().backward()
        return [(each.most, each.peak / size**2) for each in (in_forward, in_backward)]

    found = alive(lambda given: masked_product(given, A, B, update))
    for (most, peak), (expected, nbytes) in zip(found, (forward, backward), strict=True):
        assert most == expected
        assert nbytes <= peak < nbytes + 0.3  # activations and factors
    (most, _), _ = alive(lambda given: given @ (frozen + (B @ A) * M).t())
    assert most >= 3  # as autograd alone keeps them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Releases of two families, in 32 bit and NF4, each with its base; and a structured one."""
    folder = tmp_path_factory.mktemp("masked")
    for family in ("llama", "phi3"):
        base = save_base(folder / f"{family}-base", sparse_config(family, tie_word_embeddings=False))
        sparse_release(folder / family, base, pattern="4:8")
    sparse_release(folder / "two-of-eight", folder / "llama-base", pattern="2:8")
    sparse_release(folder / "nf4", folder / "llama-base", pattern="4:8", nf4=True)
    other = save_base(folder / "other-base", sparse_config("llama", intermediate_size=48))
    sparse_release(folder / "other", other)
    base = save_base(folder / "structured-base", tiny_config(layers=3))
    prune(base, folder / "structured", pruning_ratio=0.5, importance="random", keep_first=1, keep_last=1)
    return folder


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def adapted(release: Path, *, masked: bool = True, **changes: Any) -> PeftModel:
    """Open a release in 32 bit, with an adapter that does something."""
    torch.manual_seed(2)
    model = get_peft_model(AutoLoramModel.from_pretrained(release, dtype=torch.float32), lora(**changes))
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_B" in name:
                factor.normal_(std=0.05)
    if masked:
        mask_lora_(model)
    return model.train()


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: each for name, each in model.named_modules() if isinstance(each, LoraLayer)}


def make_dense_(model: PeftModel, kept: dict[str, torch.Tensor]) -> PeftModel:
    """Have the layers of an unmasked model compute W + s (B A) o M and one product, by autograd alone."""

    def forward(layer: Any, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        base = layer.base_layer
        with torch.no_grad():  # what the base layer makes of the unit vectors, in NF4 too
            zero = base(torch.zeros(layer.in_features))
            weight = (base(torch.eye(layer.in_features)) - zero).t()
        dense = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * mask
        return functional.linear(x, weight + layer.scaling["default"] * dense, zero)

    for name, layer in lora_layers(model).items():
        layer.forward = lambda x, layer=layer, mask=kept[name]: forward(layer, mask, x)
    return model


def nonzero_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The mask as the weights of a release in 32 bit show it."""
    return {name: layer.base_layer.weight.detach() != 0 for name, layer in lora_layers(model).items()}


def gradients(model: PeftModel, *, seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], most: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    assert max(error(found[name], expected[name].double()) for name in expected) < most


@pytest.mark.parametrize("release", ["llama", "phi3", "nf4"])
def test_a_masked_model_is_the_one_with_dense_masked_updates(folder: Path, release: str) -> None:
    masked, plain = adapted(folder / release), adapted(folder / release, masked=False)
    kept = nonzero_weights(adapted(folder / release.replace("nf4", "llama"), masked=False))

    unmasked = gradients(plain)
    reference = make_dense_(plain, kept)

    with torch.no_grad():
        assert error(masked(IDS).logits, reference(IDS).logits.double()) < 1e-5
    found, expected = gradients(masked), gradients(reference)
    assert_close(found, expected)
    assert len(found) == 2 * len(kept)
    with pytest.raises(AssertionError):
        assert_close(found, unmasked)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_to_the_bit(folder: Path, reentrant: bool) -> None:
    model = adapted(folder / "llama", lora_dropout=0.2)
    expected = gradients(model)

    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(each, expected[name]) for name, each in gradients(model, seed=4).items())  # dropout


@pytest.mark.parametrize("release", ["llama", "nf4"])
def test_autocast_gives_the_gradients_of_32_bit_up_to_rounding(folder: Path, release: str) -> None:
    model = adapted(folder / release)
    expected = gradients(model)

    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)

    assert_close(found, expected, most=0.1)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)
    assert {each.dtype for each in found.values()} == {torch.float32}


def test_a_model_in_16_bit_is_masked_too(folder: Path) -> None:
    model = adapted(folder / "llama")
    expected = gradients(model)

    found = gradients(model.bfloat16())

    assert {each.dtype for each in found.values()} == {torch.bfloat16}
    assert_close(found, expected, most=0.15)


def hook_(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        layer.base_layer.register_forward_hook(lambda *_: None)


def unfreeze_(model: PeftModel) -> None:
    for layer in lora_layers(model).values():
        layer.base_layer.weight.requires_grad_(True)


@pytest.mark.parametrize(("release", "change_"), [("llama", hook_), ("llama", unfreeze_), ("nf4", hook_)])
def test_where_the_base_layer_computes_itself_the_update_is_the_same(
    folder: Path, release: str, change_: Callable[[PeftModel], None]
) -> None:
    model = adapted(folder / release)
    expected = gradients(model)

    change_(model)
    found = gradients(model)

    # In its backward pass bitsandbytes rounds dequantized weights to the type they were quantized from, here bfloat16.
    rounding = 1e-2 if release == "nf4" else 1e-4
    assert_close({name: each for name, each in found.items() if "lora_" in name}, expected, rounding)


def test_dropout_takes_features_from_all_tokens_alike_and_only_in_training(folder: Path) -> None:
    model = adapted(folder / "llama", lora_dropout=0.5)
    layer = next(each for name, each in lora_layers(model).items() if name.endswith("q_proj"))
    tokens = torch.eye(24).expand(2, 24, 24)  # a token for each input feature, twice
    with torch.no_grad():
        update = layer.eval()(tokens) - layer.base_layer(tokens)
        torch.manual_seed(7)
        dropped = layer.train()(tokens) - layer.base_layer(tokens)

    is_left = dropped[0].abs().sum(dim=1) > 1e-4
    assert 0 < int(is_left.sum()) < 24
    assert torch.equal(dropped[0], dropped[1])
    assert torch.allclose(dropped[0], update[0] * is_left[:, None] * 2, atol=1e-5)


def test_adapters_come_and_go_as_on_any_model(folder: Path) -> None:
    model = adapted(folder / "llama").eval()
    base = AutoLoramModel.from_pretrained(folder / "llama", dtype=torch.float32)
    with torch.no_grad():
        untouched, first = base(IDS).logits, model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, untouched)

        model.add_adapter("second", lora(r=2, init_lora_weights=False))
        model.set_adapter("second")
        second = model(IDS).logits
        dense = make_dense_(deepcopy(adapted(folder / "llama", masked=False)), nonzero_weights(model))
        for name, layer in lora_layers(dense).items():
            twin = lora_layers(model)[name]
            layer.lora_A["default"], layer.lora_B["default"] = twin.lora_A["second"], twin.lora_B["second"]
            layer.scaling["default"] = twin.scaling["second"]
        assert error(second, dense(IDS).logits.double()) < 1e-5  # an adapter that is added later is masked too

        mixed = model(IDS[:1].expand(3, -1), adapter_names=["second", "__base__", "default"]).logits
        for row, expected in enumerate((second, untouched, first)):
            assert error(mixed[row], expected[0].double()) < 1e-5

        for layer in lora_layers(model).values():
            layer.set_adapter(["default", "second"])
        both = model(IDS).logits
        model.merge_adapter(["default", "second"])
        assert error(both, model(IDS).logits.double()) < 1e-5
        model.unmerge_adapter()
        model.set_adapter("default")
        model.delete_adapter("second")
        assert error(model(IDS).logits, first.double()) < 1e-5


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merged_model_answers_alike_and_keeps_its_zeros(folder: Path, safe_merge: bool) -> None:
    model = adapted(folder / "llama").eval()
    kept = nonzero_weights(model)
    with torch.no_grad():
        expected = model(IDS).logits

        merged = model.merge_and_unload(safe_merge=safe_merge)

        assert error(merged(IDS).logits, expected.double()) < 1e-5
    for name, mask in kept.items():
        weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        assert torch.equal(weight != 0, mask)


def test_what_is_saved_is_plain_lora(folder: Path, tmp_path: Path) -> None:
    for name, masked in (("masked", True), ("plain", False)):
        adapted(folder / "llama", masked=masked).save_pretrained(str(tmp_path / name))

    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("masked", "plain")]
    for config in configs:
        config["target_modules"].sort()  # PEFT holds them in a set
    assert configs[0] == configs[1]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("masked", "plain")]
    assert weights[0] == weights[1]


def test_masks_go_where_the_layers_go_and_are_no_part_of_the_state(folder: Path) -> None:
    plain, model = adapted(folder / "llama", masked=False), adapted(folder / "llama")

    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    bits = [layer.kept_weights.bits for layer in lora_layers(model).values()]
    weights = [layer.base_layer.weight for layer in lora_layers(model).values()]
    assert sum(each.nbytes for each in bits) * 8 == sum(each.numel() for each in weights)
    copied = deepcopy(model).to("meta")
    assert {layer.kept_weights.bits.device.type for layer in lora_layers(copied).values()} == {"meta"}
    assert {layer.kept_weights.bits.device.type for layer in lora_layers(model).values()} == {"cpu"}
    assert (is_masked(model), is_masked(nn.Sequential(model)), is_masked(plain), is_masked(None)) == (
        True, True, False, False,
    )  # fmt: skip
    assert is_masked(adapted(folder / "llama", target_modules=["q_proj", "lm_head"]))


def test_masking_again_changes_nothing_and_reaches_what_another_adapter_brought(folder: Path) -> None:
    model = adapted(folder / "llama", target_modules=["q_proj"])
    before = gradients(model)
    mask_lora_(model)
    assert_close(gradients(model), before, most=1e-9)

    model.add_adapter("second", lora(target_modules=["down_proj"], init_lora_weights=False))
    assert is_masked(model)  # the active adapter is
    model.set_adapter("second")
    assert not is_masked(model)
    unmasked = gradients(model)
    mask_lora_(model)
    assert is_masked(model)
    with pytest.raises(AssertionError):
        assert_close(gradients(model), unmasked)


def plain_model(folder: Path) -> Any:
    return AutoLoramModel.from_pretrained(folder / "llama")


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no adapter": (plain_model, InvalidRequestError, "without an adapter"),
    "structured": (lambda at: adapted(at / "structured", masked=False), InvalidRequestError, "is a structured release"),
    "no release": (
        lambda at: get_peft_model(AutoModelForCausalLM.from_pretrained(at / "llama-base"), lora()),
        InvalidRequestError, "was not opened with AutoLoramModel",
    ),
    "no projection": (
        lambda at: adapted(at / "llama", masked=False, target_modules=["lm_head"]), InvalidRequestError,
        "No projection of the model has LoRA",
    ),
    "DoRA": (lambda at: adapted(at / "llama", masked=False, use_dora=True), UnsupportedAdapterError, "DoraLinear"),
    "PiSSA": (
        lambda at: adapted(at / "llama", masked=False, init_lora_weights="pissa"), UnsupportedAdapterError,
        "changes the weights of the model, zeros too",
    ),
    "merged": (lambda at: merged(adapted(at / "llama", masked=False)), IncompatibleError, "is merged into"),
}  # fmt: skip


def merged(model: PeftModel) -> PeftModel:
    model.merge_adapter()
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_masked_is_refused_and_left_alone(folder: Path, name: str) -> None:
    make, kind, words = REFUSED[name]
    model = make(folder)

    with pytest.raises(kind, match=words):
        mask_lora_(model)

    assert not is_masked(model)


def test_torn_masks_leave_the_model_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(folder / "llama", masked=False)
    read, seen = MaskFile.read, []

    def read_some(self: MaskFile, name: str) -> Any:
        seen.append(name)
        if len(seen) == 5:
            raise VerificationError(f"{name} is torn.")
        return read(self, name)

    monkeypatch.setattr(MaskFile, "read", read_some)
    with pytest.raises(VerificationError, match="is torn"):
        mask_lora_(model)

    assert not any(isinstance(module, MaskedLayer) for module in model.modules())


@pytest.mark.parametrize("name", ["other", "two-of-eight"])
def test_masks_of_another_release_are_refused(folder: Path, name: str) -> None:
    model = adapted(folder / "llama", masked=False)
    other = AutoLoramModel.from_pretrained(folder / name).loram

    with pytest.raises(PlanMismatchError, match="keeps other weights than"):
        mask_lora_(model, other)  # type: ignore[arg-type]  # of the class that AutoLoramModel makes

    assert not is_masked(model)


def test_an_adapter_that_is_no_plain_lora_cannot_be_added_later(folder: Path) -> None:
    model = adapted(folder / "llama")

    with pytest.raises(UnsupportedAdapterError, match="no DoRA"):
        model.add_adapter("second", lora(use_dora=True))


@pytest.fixture(scope="module")
def in_two_processes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `masked_ranks` saw."""
    out = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    script = Path(__file__).with_name("masked_ranks.py")
    subprocess.run([sys.executable, str(script), str(folder / "llama"), str(out)], env=environment, check=True)
    return out


def test_parameters_that_fsdp_shares_out_are_refused(in_two_processes: Path) -> None:
    refused = json.loads((in_two_processes / "refused.json").read_text())

    assert refused.keys() == {"forward", "SealCallback", "RecoverCallback"}
    assert all("Train with DistributedDataParallel, or leave the masks away" in words for words in refused.values())


def test_two_processes_train_as_one_on_both_their_batches(folder: Path, in_two_processes: Path) -> None:
    ranks = [torch.load(in_two_processes / f"{rank}.pt") for rank in (0, 1)]
    model = adapted(folder / "llama")
    halves = []
    for ids in IDS.split(1):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        halves.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    for name in halves[0]:
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert error(ranks[0][name], (halves[0][name] + halves[1][name]).double() / 2) < 1e-4
