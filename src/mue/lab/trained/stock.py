"""Checkpoints of ``transformers`` asked about text, with any number of active experts. Needs the ``hf`` extra.

The number of experts per token is the config's own, whatever the family calls it (``mue.layouts.observe.names``), and what their weights sum
to was observed, as ``mue inspect`` shows it. Another number is another config over the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mue.lab.data.encode import tokenizer_encoder
from mue.lab.trained.evaluate import Logits
from mue.lab.trained.tokens import TextTokens
from mue.layouts.observe.config import find_integer, size_of, text_config, with_active
from mue.layouts.observe.gates import scaled_gates
from mue.layouts.observe.names import ACTIVE_GROUPS, EXPERT_GROUPS, SEQUENCE
from mue.layouts.of_model import placed
from mue.layouts.transformers.configs import build, read_config, read_stock
from mue.layouts.transformers.disk import compare_stored
from mue.layouts.transformers.shape import Routers
from mue.layouts.transformers.stock import observe_stock
from mue.moe.routers.base import SCALES
from mue.rules.roles import ROLES
from mue.util.files import read_text

LONGEST = 1024  # tokens of a window, where the model could take more
_PROBE = 4  # tokens that show whether scaled gates arrive


class StockCheckpoint:
    """A folder with weights and config, as a :class:`mue.lab.trained.active.AnyActive`.

    Args:
        folder: with a ``config.json`` and safetensors. device: where the model is asked; in float32.

    Attributes:
        sequence: tokens of a window. vocab: of the model.

    Raises:
        ValueError: no such config, no safetensors, weights that do not fit; no ``transformers``.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.config, self.folder, self.device = read_config(folder), folder, device
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} has no weights in safetensors: save it again with save_pretrained")
        self.model = _loaded(folder, self.config).to(device)
        self.name = f"{type(self.config).__name__} of {folder.name}"
        self.vocab = size_of(self.config, "vocabulary") or 0
        self.sequence = min(LONGEST, find_integer(self.config, SEQUENCE) or LONGEST)
        self.groups = 1
        self._routing: Routers | None = None

    def tokens(self, path: Path | None = None) -> TextTokens:
        """Its tokenizer.

        Args:
            path: of another ``tokenizer.json`` than the folder's.

        Raises:
            ValueError: there is none.
        """
        path = path or self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} has no tokenizer.json: say where its tokenizer is with --tokenizer")
        return TextTokens(tokenizer_encoder(path, self._end()), path, self._end())

    def _end(self) -> str | None:
        """The text of the token between documents, as the folder says it."""
        try:
            found = json.loads(read_text(self.folder / "tokenizer_config.json")).get("eos_token")
        except (OSError, ValueError):
            return None
        found = found.get("content") if isinstance(found, dict) else found
        return found if isinstance(found, str) else None

    # ---- any number of active experts --------------------------------------------------------------------------------

    @property
    def routing(self) -> Routers:
        """How the model weighs its experts, as observed; ``ValueError`` where it has none."""
        if self._routing is None:
            self._routing = observe_stock(self.model).routing
        if self._routing is None:
            raise ValueError(f"{self.name} has no routed experts, and so no number of active ones: leave --active out")
        return self._routing

    @property
    def trained(self) -> int:
        return self.routing.active

    @property
    def experts(self) -> int:
        allowed = size_of(self.config, "experts") or self.trained
        groups = find_integer(self.config, EXPERT_GROUPS)
        limited = find_integer(self.config, ACTIVE_GROUPS)
        # a token chooses among the experts of its best groups only (DeepSeek-V3)
        return allowed if groups is None or limited is None else allowed // groups * limited

    @property
    def scales(self) -> tuple[str, ...]:
        # Weights that are not renormalised grow with their number by themselves: that is the family's own code, "sum".
        return ("mean", "root") if self.routing.normalised else ("mean", "root", "sum")

    def logits(self, tokens_BT: Tensor) -> Tensor:
        return self._logits(self.model, tokens_BT)

    def _logits(self, model: nn.Module, tokens_BT: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens_BT.to(self.device), use_cache=False).logits
        return found

    def is_trained(self, active: int) -> bool:
        return active == self.trained

    def _factor(self, active: int, scale: str) -> float:
        """What the weights are multiplied by: normalised ones sum to one number whatever k′ is (``mean``); others grow with k′ (``sum``), in
        proportion where scores are alike, and that is what their other scales take for granted."""
        own = 0.0 if self.routing.normalised else 1.0
        return float((active / self.trained) ** (SCALES[scale] - own))

    def refusal(self, active: int, scale: str) -> str | None:
        if self._factor(active, scale) == 1 or self._handed_weights:
            return None
        return (
            f"the experts of {self.name} are not handed their weights, so that these cannot be scaled: use --scale"
            f" {'mean' if self.routing.normalised else 'sum'}, which the model computes by itself"
        )

    @cached_property
    def _handed_weights(self) -> bool:
        """Whether scaled weights arrive."""
        with torch.no_grad(), scaled_gates(self.model, 2.0) as seen:
            self._logits(self.model, torch.arange(_PROBE)[None] % self.vocab)
        return bool(seen)

    @contextmanager
    def at(self, active: int, scale: str) -> Iterator[Logits]:
        """With k′ in the config, and the weights scaled."""
        if self.is_trained(active):
            yield self.logits
            return
        if why := self.refusal(active, scale):
            raise ValueError(why)
        model = self._with_active(active)
        with scaled_gates(model, self._factor(active, scale)):
            yield lambda tokens_BT: self._logits(model, tokens_BT)

    def _with_active(self, active: int) -> nn.Module:
        """The same weights under another config."""
        with torch.device("meta"):
            model = build(with_active(self.config, active)).eval()
        # by reference: a second copy of a large model would not fit
        for name, own in self.model.named_modules():
            here = model.get_submodule(name)
            here._parameters, here._buffers = own._parameters, own._buffers
        return model

    def flops(self, active: int | None) -> float:
        k, N = self.trained, size_of(self.config, "experts") or 1
        matrices = attention = 0.0
        for p in placed(self.model):
            role = ROLES[p.role]
            if p.parameter.dim() < 2 or p.layout.role in ("embedding", "position"):
                continue
            share = (active or k) / N if role.kind == "expert" else 1.0
            matrices += share * p.parameter.numel()
            attention += p.fan_in if p.role == "attention_o" else 0
        if getattr(text_config(self.config), "tie_word_embeddings", False):
            matrices += self.vocab * (size_of(self.config, "width") or 0)
        return 2 * matrices + 4 * attention * self.sequence


def _loaded(folder: Path, config: Any) -> nn.Module:
    """The model of a folder, in float32 and eval mode."""
    with torch.device("meta"):
        fit = compare_stored(folder, build(config))
    if not fit.fits:  # the library would draw what is missing
        raise ValueError(
            f"the weights in {folder} do not fit its config.json ({'; '.join(fit.lines()[1:3])}): mue inspect {folder}"
        )
    try:
        model: nn.Module = read_stock(folder)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as a checkpoint ({' '.join(str(error).split())[:200]})") from error
    return model
