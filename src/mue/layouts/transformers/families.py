"""The model families of the installed ``transformers``: configs in, descriptions out. Needs the ``hf`` extra."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mue.layouts.layout import Layout, pattern_of
from mue.layouts.observe.axis_sizes import Build, parameter_shapes
from mue.layouts.observe.config import attributes, size_of, subconfigs, text_config
from mue.layouts.observe.describe import Description, ParamPattern, describe
from mue.layouts.transformers.tiny import shrunk_enough
from mue.util.errors import nearest

_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "output_gate_type": "sigmoid",
}
# What a family's default config leaves open, so that it is a model with experts at all.
INCOMPLETE: dict[str, dict[str, Any]] = {
    "dbrx": {"d_model": 2048},
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "doge": {"is_moe": True, "num_experts": 64},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 64,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "hidden_size_per_layer_input": 0,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_moe": {"num_experts": 16, "moe_topk": 4, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16, "num_dense_layers": 1},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
}
# The same inside a nested config, and tiny sizes that a family's own code needs.
NESTED: dict[str, dict[str, Any]] = {
    "dbrx": {"rope_theta": 10_000.0, "moe_num_experts": 8, "moe_top_k": 2, "clip_qkv": 8.0}
}


def _transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ValueError("model families of transformers need the hf extra: pip install 'mue[hf]'") from None
    transformers.logging.set_verbosity_error()
    return transformers


def default_config(family: str) -> Any:
    """The default config of a causal-LM family such as ``"qwen3_moe"``; ``ValueError`` naming the nearest known one."""
    known = _transformers().CONFIG_MAPPING
    if family not in known:
        raise ValueError(f"unknown model family {family!r}{nearest(family, list(known))}")
    config = known[family](**INCOMPLETE.get(family, {}))
    for part in subconfigs(config):
        for key, value in NESTED.get(family, {}).items():
            if part is not config:
                setattr(part, key, value)
    return config


def read_config(source: str | Path) -> Any:
    """A config from a ``config.json``, a folder that holds one, or a family's name.

    Raises:
        ValueError: neither; or a file that is no transformers config.
    """
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        return default_config(str(source))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a transformers config: it needs JSON with a model_type ({error})") from None
    return config_of(data, str(path))


def config_of(data: Any, where: str) -> Any:
    """A config from what its ``config.json`` holds; ``ValueError`` naming ``where`` for anything else."""
    family = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(family, str):
        raise ValueError(f"{where} is not a transformers config: it needs JSON with a model_type")
    known = _transformers().CONFIG_MAPPING
    if family not in known:
        raise ValueError(
            f"{where}: this transformers does not know model_type {family!r}{nearest(family, list(known))}"
        )
    return known[family].from_dict(data)


def build(config: Any) -> nn.Module:
    """The causal language model of a config, on the current default device."""
    transformers = _transformers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-any-return]


def describe_config(config: Any, rows: Sequence[Layout] = (), build: Build = build) -> Description:
    """Roles for every parameter of a transformers config of any size, observed on a tiny model of its family.

    The rows hold for the config's own size. A parameter that only the full model has is undecided.

    Raises:
        ValueError: the family cannot be built or run at a tiny size (with its own error); a user's row that fits nothing.
    """
    full = parameter_shapes(build, config)
    wanted = {pattern_of(n) for n in full}
    nested = NESTED.get(getattr(config, "model_type", ""), {})
    try:
        tiny = shrunk_enough(
            config, lambda c: {pattern_of(n) for n in parameter_shapes(build, c)} if c is not config else wanted, nested
        )
        seen = describe(build, tiny, rows)
    except (ValueError, KeyboardInterrupt):
        raise
    except Exception as error:  # a family's own code failed on our tiny config
        text = str(error).splitlines()[0][:160] if str(error) else ""
        raise ValueError(
            f"a tiny {type(config).__name__} could not be built and run ({type(error).__name__}: {text}); give a config"
            " of a small model of this family, or describe it with mue.layouts.observe.describe"
        ) from error
    by_pattern = {f.pattern: f for f in seen.patterns}
    stacked = size_of(config, "experts") or 1
    shapes = {pattern_of(n): shape for n, shape in full.items()}
    missing = "the tiny model has no such parameter"
    patterns = [
        replace(f, shape=shapes[p], row=_restacked(f.row, stacked))
        if (f := by_pattern.get(p)) is not None
        else ParamPattern(p, shapes[p], None, missing)
        for p in shapes
    ]
    return replace(seen, patterns=tuple(patterns))


def _restacked(row: Layout | None, experts: int) -> Layout | None:
    if row is None or not any(a.startswith("expert*") for a in row.axes):
        return row
    return replace(row, stacked=experts)


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
