"""`loram estimate`: does a training fit a GPU?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loram_hub.cli.group import EXIT_RESOURCE, main
from loram_hub.cli.options import combined, hub_options, json_option
from loram_hub.cli.output import print_result

if TYPE_CHECKING:
    from loram_hub.estimation import TrainingShape

_training_options = combined(
    click.option("--seq", "sequence_length", type=int, default=512, show_default=True, help="Tokens of a sequence."),
    click.option("--micro-batch", type=int, default=1, show_default=True, help="Sequences that a GPU takes at a time."),
    click.option("--rank", type=int, default=8, show_default=True, help="Rank of LoRA."),
    click.option("--targets", help="Modules with LoRA, as in q_proj,v_proj. Default: every projection."),
    click.option(
        "--masked-lora/--plain-lora", default=False, help="Masked LoRA, for sparse releases. Default: plain LoRA."
    ),
    click.option("--dropout", type=float, default=0.05, show_default=True, help="Dropout of LoRA, in [0, 1)."),
    click.option(
        "--optim",
        "optimizer",
        type=click.Choice(["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]),
        default="paged_adamw_8bit",
        show_default=True,
        help="Optimizer, by the Trainer's name.",
    ),
    click.option("--checkpointing/--no-checkpointing", default=True, help="Gradient checkpointing. Default: on."),
    click.option("--processes", type=int, default=1, show_default=True, help="GPUs that train together (DDP)."),
)
_memory_options = combined(
    click.option(
        "--embedding",
        type=click.Choice(["device", "cpu", "int8"]),
        default="device",
        show_default=True,
        help="Where the input embedding is.",
    ),
    click.option(
        "--lm-head",
        type=click.Choice(["device", "int8", "nf4"]),
        default="device",
        show_default=True,
        help="How the frozen lm_head is kept.",
    ),
    click.option("--offload-activations", is_flag=True, help="Keep the inputs of layers in main memory."),
)
_base_options = combined(
    click.option("--pruning-ratio", type=float, help="Of a base model: as if a release of this ratio were made."),
    click.option("--keep-first", type=int, help="Whole layers at the start. Default: 4."),
    click.option("--keep-last", type=int, help="Whole layers at the end. Default: 2."),
    click.option("--round-to", type=int, help="Round kept MLP channels up to a multiple. Off by default."),
    click.option("--16-bit", "sixteen_bit", is_flag=True, help="Of a base model: weights in 16 bit, not in NF4."),
)


@main.command(
    name="estimate", epilog="Example: loram estimate org/Llama-3.1-70B-LoRAM-0.85 --gpu 20GB --seq 512 --micro-batch 4"
)
@click.argument("target")
@click.option(
    "--gpu", default="20GB", show_default=True, help="Memory (20GB; a GB of a GPU is 2^30 bytes) or name (rtx4090, l4)."
)
@_training_options
@_memory_options
@_base_options
@click.option("--picture", type=click.Path(path_type=Path), help="Draw it as a waterfall to this PNG file.")
@hub_options
@json_option
def estimate(
    target: str,
    gpu: str,
    sixteen_bit: bool,
    picture: Path | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Say whether training on TARGET fits a GPU (exit code 6 if not), and up to which settings it does.

    TARGET is a release (Hub id or folder), or a base model (Hub id, folder or config.json) with --pruning-ratio or
    without. The zeros of a sparse release save nothing: it takes what its base takes. Only configs and headers are
    read; nothing is measured.
    """
    from loram_hub.fitting import estimate_memory, fit_text, save_picture

    given = {name: options[name] for name in ("pruning_ratio", "keep_first", "keep_last", "round_to")}
    fit = estimate_memory(
        target,
        gpu=gpu,
        shape=_shape(options),
        quantized=False if sixteen_bit else None,
        revision=options["revision"],
        token=options["token"],
        **given,
    )
    drawn = None if picture is None else {"file": str(picture), "alternative_text": save_picture(fit, picture)}
    print_result(fit.to_dict() | {"picture": drawn}, as_json, lambda: click.echo(fit_text(fit)))
    if not fit.fits:
        click.get_current_context().exit(EXIT_RESOURCE)


def _shape(options: dict[str, Any]) -> TrainingShape:
    from loram_hub.estimation import MemoryOptions, TrainingShape

    targets = options["targets"]
    same = (
        "sequence_length", "micro_batch", "rank", "masked_lora", "dropout", "optimizer", "checkpointing", "processes",
    )  # fmt: skip
    return TrainingShape(
        **{name: options[name] for name in same},
        targets=None if targets is None else tuple(name.strip() for name in targets.split(",") if name.strip()),
        options=MemoryOptions(
            embedding=options["embedding"],
            lm_head=options["lm_head"],
            activation_offloading=options["offload_activations"],
        ),
    )
