"""The linear layers that LoRA adapts: their paths, their shapes, and the short names that target them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from loram_hub.architecture import LM_HEAD, Architecture, LayerSizes, layer_tensor
from loram_hub.errors import PlanMismatchError

LM_HEAD_MODULE = LM_HEAD.removesuffix(".weight")


def linear_modules(architecture: Architecture) -> list[str]:
    """Paths of all modules that LoRA can adapt here: the projections of every layer, and the lm_head."""
    projections = [
        layer_tensor(layer, weight.module)
        for layer in range(architecture.num_hidden_layers)
        for weight in architecture.projections
    ]
    return [*projections, LM_HEAD_MODULE]


def module_shape(
    architecture: Architecture, module: str, layers: tuple[LayerSizes, ...] = ()
) -> tuple[int, int] | None:
    """Shape of a linear layer's weight, (out_features, in_features); None if the model has no such layer.

    Args:
        architecture: the model.
        module: full path, as in `model.layers.3.mlp.down_proj` or `lm_head`.
        layers: sizes of each layer of a pruned model; empty for the whole one.
    """
    if module == LM_HEAD_MODULE:
        return architecture.vocab_size, architecture.hidden_size
    try:
        found = architecture.weight_of(f"{module}.weight")
    except PlanMismatchError:
        return None
    if found is None or not found[1].is_projection:
        return None
    layer, weight = found
    rows, columns = architecture.shape(weight, layers[layer] if layers else architecture.whole_layer)
    return rows, columns


def shortest_targets(modules: Collection[str], candidates: Iterable[str]) -> tuple[str, ...]:
    """Name modules as `target_modules` likes it: by their last names if those hit no other, else by full paths."""
    names = {module.rpartition(".")[2] for module in modules}
    hit = {module for module in candidates if module.rpartition(".")[2] in names}
    return tuple(sorted(names if hit == set(modules) else modules))


def uneven_module(shapes: Mapping[str, tuple[int, int]]) -> tuple[str, str] | None:
    """Find two layers whose modules of one name differ in shape: no model of a supported family is built so.

    Args:
        shapes: (out_features, in_features) by module path.

    Returns:
        The paths of the first such two modules, or None.
    """
    seen: dict[str, str] = {}
    for module in sorted(shapes):
        name = module.rpartition(".")[2]
        first = seen.setdefault(name, module)
        if shapes[first] != shapes[module]:
            return first, module
    return None
