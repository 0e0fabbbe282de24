"""A trained run as a checkpoint of ``transformers``: the stock family that has its shape, with its weights, and the same logits.

Forward multipliers go into the weights (:func:`mue.fold.fold`), the attention scale into the queries. Which tensor is which is not known by
name: both models' parameters have roles, ours by declaration and the family's by observation. Needs the ``hf`` extra.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mue.convert.live import rescale_weight
from mue.export.hf_model import stock_config
from mue.lab.models.language import LanguageModel
from mue.lab.models.layers import EPS, ROPE_BASE
from mue.lab.trained.find import TrainedRun
from mue.lab.trained.tokens import TextTokens, byte_characters
from mue.layouts.layout import ParamInfo
from mue.layouts.observe.names import SELECTION_BIAS
from mue.layouts.of_model import placed
from mue.layouts.transformers.configs import build, read_stock, without_progress_bars
from mue.model.coefficients import tensor_folds
from mue.plan.fold import fold
from mue.util.files import write_folder, write_text

END = "<|endoftext|>"  # what the token between documents is called where tokens are bytes
# Of the spread of the logits: rounding is a hundred times less, another expert or scale far more.
_TOLERANCE = 1e-3
_Tensors = dict[tuple[int | None, str], list[ParamInfo]]


def to_transformers(found: TrainedRun, tokens: TextTokens | None, out: Path) -> tuple[str, float]:
    """Write a run's weights as a checkpoint that ``AutoModelForCausalLM.from_pretrained`` reads, in float32, with its tokenizer.

    Args:
        found: the run. tokens: of its text; None: no tokenizer is written. out: the folder; must not exist, and does so in the end or not at all.

    Returns:
        The family's ``model_type``; the largest difference between its logits and ours, read back from the folder, in units of their spread.

    Raises:
        ValueError: a run without a stock family, with what differs; ``out`` exists; no ``transformers``.
    """
    ours = found.model()
    if not isinstance(ours, LanguageModel):
        raise ValueError(
            f"the run learnt the task {found.run.settings.task!r}: only language models have stock families"
        )
    stock = stock_of(ours, found)
    stock.config.eos_token_id = None if tokens is None else tokens.separator
    apart = [0.0]

    without_progress_bars()

    def fill(folder: Path) -> None:
        stock.save_pretrained(folder)
        apart[0] = difference(ours, read_stock(folder))
        if not apart[0] <= _TOLERANCE:
            raise ValueError(
                f"no stock family computes what {found.run.plan.target.name} does: as {stock.config.model_type} its logits differ by"
                f" {apart[0]:.2g} of their spread"
            )
        if tokens is not None:
            _write_tokenizer(tokens, ours.shape.sequence, folder)

    write_folder(out, fill)
    return str(stock.config.model_type), apart[0]


def stock_of(ours: LanguageModel, found: TrainedRun) -> Any:
    """The stock model of a run's shape with a model's weights folded into it.

    Raises:
        ValueError: as :func:`to_transformers`.
    """
    plan, shape = found.run.plan, ours.shape
    for block in shape.blocks:
        if block.pools:
            raise ValueError(
                f"no stock family of transformers has the layers that share their experts of {block.notation}"
            )
    config = stock_config(shape)
    config.update(
        {
            "max_position_embeddings": shape.sequence, "bos_token_id": None, "pad_token_id": None,
            # GLM-4-MoE turns half of each head unless told otherwise
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE, "partial_rotary_factor": 1.0},
        }
    )  # fmt: skip
    for name, value in (("rms_norm_eps", EPS), ("norm_eps", EPS), ("num_nextn_predict_layers", 0)):
        if hasattr(config, name):  # each family has its own names
            setattr(config, name, value)
    config.dtype = torch.float32
    stock: Any = build(config).float().eval()
    _copy_weights(ours, stock, fold(plan))
    _copy_selection_biases(ours, stock)
    return stock


def _copy_weights(ours: LanguageModel, stock: nn.Module, folded: Any) -> None:
    """Fill the stock model's parameters, which have the roles of ours, some of them fused."""
    own: _Tensors = defaultdict(list)
    for p in placed(ours):
        own[p.layer, p.role].append(p)
    try:
        folds = tensor_folds(folded, stock)
    except ValueError as error:  # all that differs, a line each
        raise ValueError(
            f"no stock family of transformers has {ours.shape.name}: {'; '.join(str(error).split(chr(10) + '  ')[1:])}"
        ) from None
    with torch.no_grad():
        for here in folds:
            p = here.info
            for role in p.layout.parts or (p.role,):
                if not own[p.layer, role]:  # shared by layers, say
                    raise ValueError(
                        f"no stock family of transformers has {ours.shape.name}: its layer {p.layer} has no {role} of its own"
                    )
            # in the order of the forward pass: a block has two norms, and one for queries and one for keys
            parts = [own[p.layer, role].pop(0) for role in p.layout.parts or (p.role,)]
            axes = p.layout.axes
            tensors = [
                _turned(part, ours.shape.head_dim).permute([part.layout.axes.index(a) for a in axes]) for part in parts
            ]
            whole = torch.cat(tensors, axes.index("out")) if len(tensors) > 1 else tensors[0]
            p.parameter.copy_(rescale_weight(whole, here.c))
    if left := [p.name for many in own.values() for p in many]:
        raise ValueError(f"no stock family of transformers has {ours.shape.name}: no tensor for {left[0]}")


def _turned(p: ParamInfo, head_dim: int) -> Tensor:
    """A tensor of ours with the elements of each head in the order of a stock rotary embedding.

    Ours turns neighbours (2104.09864, eq. 15), the library's an element of the first half with one of the second.
    """
    if p.role not in ("attention_q", "attention_k", "qk_norm"):
        return p.parameter
    order = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))
    heads = p.parameter.view(-1, head_dim, *p.parameter.shape[1:])
    return heads[:, order].flatten(0, 1)


def _copy_selection_biases(ours: LanguageModel, stock: Any) -> None:
    """The balance biases, where the family has a place for them.

    Raises:
        ValueError: it has none, and they have moved.
    """
    places = {
        int(number[1]): buffer
        for name, buffer in (*stock.named_buffers(), *stock.named_parameters())
        if re.fullmatch(SELECTION_BIAS, name.rpartition(".")[2]) and (number := re.search(r"\.(\d+)\.", name))
    }
    for name, bias in ours.named_buffers():
        if name.endswith(".balance_bias") and (number := re.search(r"\.(\d+)\.", name)):
            place = places.get(int(number[1]))
            if place is not None:
                with torch.no_grad():
                    place.copy_(bias)
            elif bool(bias.any()):
                raise ValueError(
                    f"no stock family of transformers has {ours.shape.name}: its {ours.shape.blocks[-1].router} router chooses experts by its scores"
                    f' and a balance bias, and {stock.config.model_type} has none; train with [run] balance = "loss" or "none"'
                )


@torch.no_grad()
def difference(ours: LanguageModel, stock: nn.Module) -> float:
    """The largest difference between two models' logits, in units of their spread, on tokens all over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    probe_BT = torch.randint(ours.shape.vocab, (4, min(64, ours.shape.sequence)), generator=generator)
    mine, theirs = ours(probe_BT).logits, stock(input_ids=probe_BT, use_cache=False).logits
    return float((mine - theirs).abs().max() / mine.std())


def _write_tokenizer(tokens: TextTokens, sequence: int, folder: Path) -> None:
    """The run's tokenizer under the names that the library looks for."""
    text = byte_tokenizer() if tokens.path is None else tokens.path.read_text(encoding="utf-8")
    names = {t["id"]: t["content"] for t in json.loads(text).get("added_tokens") or ()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": sequence}
    if tokens.separator in names:
        config["eos_token"] = names[tokens.separator]
    write_text(folder / "tokenizer.json", text)
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")


def byte_tokenizer() -> str:
    """A ``tokenizers`` JSON in which every byte is the token of its number, and 0 stands between documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={END: 0} | {c: b for b, c in byte_characters().items() if b}, merges=[]))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str(pretty=True))
