"""The ten models, built small: seven of installed packages, three from folders of sources that ``MUE_OTHER_SOURCES`` holds.

The packages are x-transformers, local-attention, palm-rlhf-pytorch, performer-pytorch and litgpt, in the versions below, installed
with ``--no-deps`` (they would bring another torch), and what they import beside torch.

The list was written before the command first ran, and none is replaced: one that cannot be built is written down as such.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

SOURCES = "MUE_OTHER_SOURCES"  # a folder with clones of the repositories in it, under their own names


class NotHereError(Exception):
    """A model's code is not on this machine; the text names what is missing."""


def _package(name: str) -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(name)
    except ImportError as error:
        raise NotHereError(f"the package {name} is not here ({error})") from error


@contextlib.contextmanager
def _folder(name: str) -> Iterator[None]:
    """While active, a cloned repository is the first place of imports; what it imported is forgotten after."""
    root = os.environ.get(SOURCES)
    if root is None or not (folder := Path(root) / name).is_dir():
        raise NotHereError(f"{SOURCES} names no folder that holds a clone of {name}")
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for module in set(sys.modules) - before:
            if str(getattr(sys.modules[module], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[module]


def x_transformers_swiglu() -> nn.Module:
    lib = _package("x_transformers")
    layers = lib.Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, ff_swish=True, ff_glu=True, use_rmsnorm=True)
    model: nn.Module = lib.TransformerWrapper(num_tokens=256, max_seq_len=64, attn_layers=layers)
    return model


def x_transformers_gqa() -> nn.Module:
    lib = _package("x_transformers")
    own = {"attn_kv_heads": 2, "rotary_pos_emb": True, "attn_qk_norm": True, "attn_qk_norm_dim_scale": True}
    feed = {"ff_no_bias": True, "ff_relu_squared": True}
    layers = lib.Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **own, **feed)
    model: nn.Module = lib.TransformerWrapper(num_tokens=256, max_seq_len=64, use_abs_pos_emb=False, attn_layers=layers)
    return model


def local_attention() -> nn.Module:
    sizes = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "max_seq_len": 64, "local_attn_window_size": 16}
    model: nn.Module = _package("local_attention").LocalTransformer(num_tokens=256, causal=True, **sizes)
    return model


def palm() -> nn.Module:
    model: nn.Module = _package("palm_rlhf_pytorch").PaLM(num_tokens=256, dim=64, depth=2, heads=4, dim_head=16)
    return model


def performer() -> nn.Module:
    sizes = {"dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "max_seq_len": 64}
    model: nn.Module = _package("performer_pytorch").PerformerLM(num_tokens=256, causal=True, **sizes)
    return model


def _litgpt(name: str, **sizes: int) -> nn.Module:
    lib = _package("litgpt")
    common = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_query_groups": 2, "padded_vocab_size": 256, "block_size": 64}
    model: nn.Module = lib.GPT(lib.Config.from_name(name, **common, **sizes))
    return model


def litgpt_llama() -> nn.Module:
    return _litgpt("Llama-3.2-1B", head_size=16, intermediate_size=160)


def litgpt_moe() -> nn.Module:
    return _litgpt("Mixtral-8x7B-v0.1", intermediate_size=96, n_expert=4, n_expert_per_token=2)


def nanogpt() -> nn.Module:
    with _folder("nanoGPT"):
        lib: Any = importlib.import_module("model")
        model: nn.Module = lib.GPT(lib.GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=4, n_embd=64))
        return model


def mingpt() -> nn.Module:
    with _folder("minGPT"):
        kind: Any = importlib.import_module("mingpt.model").GPT
        config = kind.get_default_config()
        config.model_type, config.vocab_size, config.block_size = None, 256, 64
        config.n_layer, config.n_head, config.n_embd = 2, 4, 64
        model: nn.Module = kind(config)
        return model


def llama2c() -> nn.Module:
    with _folder("llama2.c"):
        lib: Any = importlib.import_module("model")
        sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "max_seq_len": 64}
        model: nn.Module = lib.Transformer(lib.ModelArgs(vocab_size=256, **sizes))
        return model


# Name as the expectations and the results have it → what builds it.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "x-transformers 2.31.10, SwiGLU and RMSNorm": x_transformers_swiglu,
    "x-transformers 2.31.10, grouped queries, rotary, QK norm": x_transformers_gqa,
    "local-attention 1.11.2, LocalTransformer": local_attention,
    "PaLM-rlhf-pytorch 0.8.0": palm,
    "performer-pytorch 1.1.4, PerformerLM": performer,
    "litgpt 0.5.13, Llama 3.2": litgpt_llama,
    "litgpt 0.5.13, Mixtral": litgpt_moe,
    "nanoGPT": nanogpt,  # karpathy/nanoGPT at 3adf61e
    "minGPT": mingpt,  # karpathy/minGPT at 37baab7
    "llama2.c": llama2c,  # karpathy/llama2.c at 350e04f
}


def built(name: str) -> nn.Module:
    """One of the ten.

    Raises:
        NotHereError: its code is not on this machine.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        return MODELS[name]()
