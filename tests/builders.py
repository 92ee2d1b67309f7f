"""Small things to test with: configs, base checkpoints, plans, releases and adapters of every family, built in memory.

Sizes are odd and unequal on purpose, so that a transposed axis or a query head counted as a KV head does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (lets safetensors' numpy side write BF16)
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from loram_hub.architecture import FAMILIES, LM_HEAD, Architecture, Indices, Space, architecture_of, layer_tensor
from loram_hub.files import dump_json, read_json, sha256_of
from loram_hub.manifest import BaseModel, Manifest, Pruning, Sparsification
from loram_hub.masks import WEIGHT_MASKS, MaskWriter, Pattern, parse_pattern
from loram_hub.plan import Plan, parameter_counts
from loram_hub.release import projection_shapes, release_config, write_release

MODEL_TYPES = tuple(sorted(FAMILIES))
HEADS: Mapping[str, tuple[int, int]] = {"mha": (3, 3), "gqa": (6, 3), "mqa": (4, 1)}
"""(query heads, KV heads) by kind of attention."""
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_config(
    model_type: str = "llama", *, attention: str = "gqa", layers: int = 4, **changes: Any
) -> dict[str, Any]:
    """Return the `config.json` of a model of about 30,000 parameters."""
    heads, kv_heads = HEADS[attention]
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": None,
        "vocab_size": 53,
        "hidden_size": 24,  # some families want a multiple of the query heads
        "intermediate_size": 37,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 10,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    return config | changes


def save_base(folder: Path, config: Mapping[str, Any], *, seed: int = 0, dtype: str = "float32") -> Path:
    """Write a base checkpoint with random weights, as transformers saves it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, which would otherwise be ones and zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def random_plan(architecture: Architecture, *, seed: int = 0, layers: Iterable[int] | None = None) -> Plan:
    """Return a plan that keeps a random, in general different number of groups in each of the given layers.

    By default the first and the last layer stay whole.
    """
    rng = np.random.default_rng(seed)

    def choose(count: int) -> Indices:
        kept = rng.choice(count, size=int(rng.integers(1, count + 1)), replace=False)
        return np.sort(kept).astype(np.int32)

    pruned = range(1, architecture.num_hidden_layers - 1) if layers is None else layers
    kept: dict[int, dict[Space, Indices]] = {
        layer: {
            "kv_heads": choose(architecture.num_key_value_heads),
            "channels": choose(architecture.intermediate_size),
        }
        for layer in pruned
    }
    return Plan(architecture, kept)


def half_plan(architecture: Architecture, *, seed: int = 0) -> Plan:
    """Return a plan with fixed sizes: two thirds of the KV heads (at least one) and half of the channels, at random."""
    rng = np.random.default_rng(seed)
    heads, channels = architecture.num_key_value_heads, architecture.intermediate_size
    kept: dict[int, dict[Space, Indices]] = {
        layer: {
            "kv_heads": np.sort(rng.permutation(heads)[: max(1, 2 * heads // 3)]).astype(np.int32),
            "channels": np.sort(rng.permutation(channels)[: channels // 2]).astype(np.int32),
        }
        for layer in range(1, architecture.num_hidden_layers - 1)
    }
    return Plan(architecture, kept)


def save_metadata_release(
    folder: Path,
    config: Mapping[str, Any],
    plan: Plan,
    *,
    base_id: str = "org/base",
    commit: str | None = "0123456789abcdef0123456789abcdef01234567",
    config_sha256: str = "0" * 64,
) -> Path:
    """Write a release without weights: manifest, mask indexes, config."""
    manifest = Manifest(
        base=BaseModel(id=base_id, commit=commit, config_sha256=config_sha256, parameters=1),
        pruning=Pruning(
            method="structured",
            importance="random",
            pruning_ratio=0.5,
            keep_first=1,
            keep_last=1,
            round_to=None,
            seed=0,
            calibration=None,
            plan_sha256=plan.digest,
        ),
        parameters=1,
    )
    with write_release(folder, manifest=manifest, plan=plan, config=release_config(config)):
        pass
    return folder


def sparse_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return a `tiny_config` whose projections all have input features in multiples of 8, as n:m patterns want."""
    return tiny_config(model_type, **{"layers": 2, "head_dim": 8, "intermediate_size": 40, **changes})


def magnitude_mask(weight: npt.NDArray[Any], pattern: Pattern, sparsity: float) -> npt.NDArray[np.bool_]:
    """Return the mask that keeps the largest weights: of each group, or of the whole matrix."""
    size = np.abs(weight).astype(np.float64)
    if pattern.is_unstructured:
        order = np.argsort(size, axis=None, kind="stable")
        kept = np.ones(size.size, dtype=np.bool_)
        kept[order[: int(sparsity * size.size)]] = False
        return kept.reshape(size.shape)
    n, m = pattern.group
    groups = size.reshape(len(size), -1, m)
    return (np.argsort(np.argsort(-groups, axis=2, kind="stable"), axis=2) < n).reshape(size.shape)


def sparse_release(
    folder: Path,
    base: Path,
    *,
    pattern: str = "unstructured",
    sparsity: float = 0.5,
    method: str = "magnitude",
    nf4: bool = False,
) -> Path:
    """Write a sparse release of a base checkpoint with masks by magnitude, whatever `method` it claims.

    It comes about without `sparsification`, through the writer of releases alone.
    """
    import torch
    from safetensors.torch import load_file

    from loram_hub.checkpoint import ShardWriter, copy_companions
    from loram_hub.quantization import as_nf4, quantized_tensors

    shape, base_config = parse_pattern(pattern), read_json(base / "config.json")
    plan = Plan(architecture_of(base_config), {})
    tensors, projected = load_file(base / "model.safetensors"), projection_shapes(plan)
    sparsity = sparsity if shape.sparsity is None else shape.sparsity
    manifest, config = _sparse_manifest(base, plan, pattern, sparsity, method), release_config(base_config)
    if nf4:
        manifest, config = as_nf4(manifest, base_config, torch.bfloat16)
    with write_release(folder, manifest=manifest, plan=plan, config=config) as out:
        copy_companions(base, out)
        writer = ShardWriter(out)
        with MaskWriter(out / WEIGHT_MASKS, projected, shape) as masks:
            for name, tensor in sorted(tensors.items()):
                mask = None
                if name in projected:
                    kept = magnitude_mask(tensor.float().numpy(), shape, sparsity)
                    masks.add(name, kept)
                    mask = torch.from_numpy(kept)
                    tensor = tensor * mask
                parts = quantized_tensors(plan.architecture, name, tensor, torch.bfloat16, mask) if nf4 else None
                for part, value in ({name: tensor} if parts is None else parts).items():
                    writer.add(part, value)
        writer.finish()
    return folder


def _sparse_manifest(base: Path, plan: Plan, pattern: str, sparsity: float, method: str) -> Manifest:
    is_sparsegpt = method == "sparsegpt"
    return Manifest(
        base=BaseModel(
            id="org/base",
            commit=None,
            config_sha256=sha256_of(base / "config.json"),
            parameters=parameter_counts(plan.architecture, plan.layers).original_parameters,
        ),
        pruning=Sparsification(
            method=method,
            pattern=pattern,
            sparsity=sparsity,
            kept_weights=0,  # counted when the release is sealed
            dampening=0.01 if is_sparsegpt else None,
            block_size=128 if is_sparsegpt else None,
            seed=0,
            calibration=None,
            plan_sha256="",
        ),
        parameters=0,
    )


def pruned_module_shapes(plan: Plan) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every projection of the pruned model by module path, and of the lm_head."""
    architecture = plan.architecture
    shapes: dict[str, tuple[int, int]] = {}
    for layer, sizes in enumerate(plan.layers):
        for weight in architecture.projections:
            rows, columns = architecture.shape(weight, sizes)
            shapes[layer_tensor(layer, weight.module)] = (rows, columns)
    shapes[LM_HEAD.removesuffix(".weight")] = (architecture.vocab_size, architecture.hidden_size)
    return shapes


def random_factors(
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int | Mapping[str, int] = 4,
    seed: int = 0,
    dtype: npt.DTypeLike = np.float32,
) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors of an adapter under PEFT's names; `rank` may differ by module."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for module, (rows, columns) in shapes.items():
        r = rank if isinstance(rank, int) else rank[module]
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((r, columns)).astype(dtype)
        tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((rows, r)).astype(dtype)
    return tensors


def save_adapter(
    folder: Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    *,
    targets: str | list[str] | None = None,
    base: str | Path | None = None,
    r: int = 4,
    lora_alpha: float = 8,
    **changes: Any,
) -> Path:
    """Write an adapter folder as PEFT does; without `targets`, every module that has tensors is one."""
    modules = sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors})
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": None if base is None else str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {},
        "revision": None,
        "target_modules": modules if targets is None else targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(dump_json(config | changes), encoding="utf-8")
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def projections(plan: Plan) -> dict[str, tuple[int, int]]:
    """`pruned_module_shapes` without the lm_head: what the seven usual targets adapt."""
    shapes = pruned_module_shapes(plan)
    del shapes[LM_HEAD.removesuffix(".weight")]
    return shapes


def tiny_architecture(model_type: str = "llama", **changes: Any) -> Architecture:
    """Return the architecture of `tiny_config`."""
    return architecture_of(tiny_config(model_type, **changes))


def save_tokenizer(folder: Path, vocab_size: int = 53) -> Path:
    """Write a tokenizer of the words w4, w5, ... beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
