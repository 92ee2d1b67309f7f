"""NF4 layers on a CPU give what their codes say, at every width that pruning can leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import save_base, tiny_config
from peft import LoraConfig, get_peft_model

pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Params4bit

from loram_hub import AutoLoramModel, prune
from loram_hub.cpu_nf4 import mend_cpu_layers_
from loram_hub.release.nf4 import nf4_table

WIDTHS = (16, 30, 32, 37, 48, 64, 80, 96, 100, 128, 144, 560)
OUT = 24


def layer_of(width: int, *, nested: bool, bias: bool = False) -> Linear4bit:
    torch.manual_seed(width)
    layer = Linear4bit(width, OUT, bias=bias, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested)
    layer.weight = Params4bit(
        torch.randn(OUT, width), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    return layer.to("cpu")


def weight_of(layer: Linear4bit) -> torch.Tensor:
    """Look every code up in the table of the format: two to a byte, the high half first; a scale for 64 of them."""
    state = layer.weight.quant_state
    packed = layer.weight.data.reshape(-1).to(torch.int64)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: state.shape.numel()]
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    values = torch.tensor(nf4_table())[codes] * scales.repeat_interleave(64)[: codes.numel()]
    return values.reshape(state.shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_layer_multiplies_with_the_weight_of_its_codes(width: int, nested: bool) -> None:
    layer = layer_of(width, nested=nested, bias=True)
    mend_cpu_layers_(layer)
    x = torch.randn(2, 3, width, requires_grad=True)

    layer(x).square().sum().backward()

    plain = x.detach().clone().requires_grad_()
    expected = torch.nn.functional.linear(plain, weight_of(layer), layer.bias)
    expected.square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-4, atol=1e-3)


def test_a_release_opens_mended_and_peft_takes_its_layers_for_what_they_are(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_config())
    prune(base, tmp_path / "release", pruning_ratio=0.5, keep_first=1, keep_last=1, importance="random", quantize=True)
    model = AutoLoramModel.from_pretrained(tmp_path / "release", dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert any(layer.in_features % 64 for layer in layers)
    for layer in layers:
        x = torch.randn(5, layer.in_features)
        torch.testing.assert_close(layer(x), x @ weight_of(layer).T, rtol=1e-4, atol=1e-4)

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))

    wrapped = {type(module).__name__ for name, module in adapted.named_modules() if name.endswith("q_proj")}
    assert wrapped == {"Linear4bit"}
