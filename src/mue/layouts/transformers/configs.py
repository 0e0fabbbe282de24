"""Configs of the installed ``transformers``, read, made by default and built. Needs the ``hf`` extra."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from mue.layouts.observe.config import attributes, subconfigs, text_config
from mue.layouts.transformers.family import family_of
from mue.util.errors import extra, nearest
from mue.util.files import read_text
from mue.util.importing import user_code


def _transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ValueError(f"model families of transformers need the hf extra: {extra('hf')}") from None
    # its warnings are about weights, and none are loaded here
    transformers.logging.set_verbosity_error()
    return transformers


def default_config(family: str) -> Any:
    """The default config of a causal-LM family, with experts where the family can have them.

    Args:
        family: its ``model_type``, such as ``"qwen3_moe"``.

    Raises:
        ValueError: the installed transformers does not know it; names the nearest one that it does.
    """
    known = _transformers().CONFIG_MAPPING
    if family not in known:
        raise ValueError(f"unknown model family {family!r}{nearest(family, list(known))}")
    special = family_of(family)
    config = known[family](**special.defaults)
    for part in subconfigs(config):
        for key, value in special.nested_defaults.items():
            if part is not config:
                setattr(part, key, value)
    return config


# What somebody who gives a file of another kind will have meant, by its suffix.
_HINTS = {
    ".py": "name what builds the model: FILE.py:FUNCTION",
    **dict.fromkeys(
        (".pt", ".pth", ".bin", ".ckpt", ".safetensors"),
        "weights do not say which model they are: give its folder, with config.json",
    ),
}


def read_config(source: str | Path) -> Any:
    """A transformers config by where it is.

    Args:
        source: a ``config.json``, a folder that holds one, or, where no such path exists, a family's name.

    Raises:
        ValueError: neither; or a file that is no transformers config.
    """
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        return default_config(str(source))
    try:
        data = json.loads(read_text(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        why = _HINTS.get(path.suffix, str(error))
        raise ValueError(f"{path} is not a transformers config: it needs JSON with a model_type ({why})") from None
    return config_of(data, str(path))


def config_of(data: Any, where: str) -> Any:
    """A config from what its ``config.json`` holds.

    Args:
        data: the parsed file. where: its name, for messages.

    Raises:
        ValueError: data without a ``model_type``, or with one that the installed transformers does not know.
    """
    family = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(family, str):
        raise ValueError(f"{where} is not a transformers config: it needs JSON with a model_type")
    known = _transformers().CONFIG_MAPPING
    if family not in known:
        raise ValueError(
            f"{where}: this transformers does not know model_type {family!r}{nearest(family, list(known))}"
        )
    with user_code(where):
        return known[family].from_dict(data)


def build(config: Any) -> nn.Module:
    """The causal language model of a config, on the current default device (``with torch.device("meta")``: no memory).

    Args:
        config: of transformers. Attention is the eager one, whose products and softmax can be observed.
    """
    transformers = _transformers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-any-return]


def read_stock(folder: Path) -> Any:
    """The model of a folder, in float32 and eval mode, from safetensors there and from nowhere else."""
    transformers = _transformers()
    without_progress_bars()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", local_files_only=True, use_safetensors=True, attn_implementation="eager"
    ).eval()


def without_progress_bars() -> None:
    """Let ``transformers`` read and write weights without drawing on the terminal."""
    _transformers().logging.disable_progress_bar()


def causal_families() -> list[str]:
    """Every causal-LM family of the installed transformers."""
    _transformers()
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return sorted(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def families_with_experts() -> list[str]:
    """Those whose config counts experts."""
    found = []
    for family in causal_families():
        try:
            config = default_config(family)
        except Exception:  # a family without a default config: the walk reports it where it has experts by name
            if "moe" in family:
                found.append(family)
            continue
        if any(attributes(part, "experts") for part in subconfigs(text_config(config))):
            found.append(family)
    return found
