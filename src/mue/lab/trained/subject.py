"""What ``mue eval`` asks: a run of the lab or a checkpoint of ``transformers``, with the text that it is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mue.lab.models.language import LanguageModel
from mue.lab.train.run import CONFIG_FILE, is_run
from mue.lab.train.step import autocast
from mue.lab.trained.active import AnyActive, RunAtAnyActive
from mue.lab.trained.evaluate import Logits
from mue.lab.trained.find import find
from mue.lab.trained.held_out import HeldOutText, own_text, text_of
from mue.lab.trained.tokens import tokens_of

SEQUENCES = 128


@dataclass(frozen=True)
class Subject:
    """A trained model and the text it is asked about.

    Attributes:
        logits: of the model as it was trained. bytes_of: how many bytes each of its tokens stands for; None: nobody knows.
        folder: where results about it belong. facts: what it is, for files. any_active: makes it a model at any number of active experts; ``ValueError`` where it
            cannot be one.
    """

    name: str
    logits: Logits
    text: HeldOutText
    bytes_of: Sequence[int] | None
    folder: Path
    facts: Mapping[str, Any]
    any_active: Callable[[], AnyActive]


def subject_of(
    path: Path,
    data: Path | None,
    sequences: int | None,
    tokenizer: Path | None,
    device: torch.device,
    *,
    folders: bool = True,
) -> Subject:
    """Find a trained model and its text.

    Args:
        path: as :func:`mue.lab.trained.find.find` takes it, or a checkpoint folder of ``transformers``. data: text of the user's; None: what the
            run held out. sequences: how many to read, at most; None: as many as the run's own validation, :data:`SEQUENCES` of other
            text. tokenizer: where it is, if it was moved. folders: the text by its folders, too.

    Raises:
        ValueError: no weights, no text, tokens that do not fit the model.
    """
    if path.is_dir() and (path / CONFIG_FILE).exists() and not is_run(path):
        return _stock(path, data, sequences, tokenizer, device, folders)
    found = find(path)
    run, model = found.run, found.model().to(device)
    if not isinstance(model, LanguageModel):
        raise ValueError(f"{path} learnt the task {run.settings.task!r}: only language models are asked about text")
    tokens, shape = tokens_of(run.data, tokenizer), run.plan.target
    own = None if tokens is None else tokens.path
    if data is None:
        text = own_text(run, sequences or run.settings.eval_sequences, tokenizer=own, folders=folders)
    else:
        # how its own text became tokens
        options = {k: v for k, v in run.data["source"].items() if k in ("separator", "text_key")}
        made_with = dict.fromkeys([run.data["tokenizer"], *([] if tokens is None else [tokens.encoder.name])])
        text = text_of(
            data,
            options | ({} if own is None else {"tokenizer": str(own)}),
            made_with=made_with,
            sequence=shape.sequence,
            vocab=shape.vocab,
            sequences=sequences or SEQUENCES,
            folders=folders,
        )

    def logits(tokens_BT: torch.Tensor) -> torch.Tensor:
        with autocast(device, run.settings):  # in the precision of the training, as its validation
            out: torch.Tensor = model(tokens_BT.to(device)).logits
            return out

    bytes_of = None if tokens is None else tokens.bytes_of
    facts = {
        "model": found.name,
        "run": run.key,
        "plan": run.plan.hash,
        "seed": run.settings.seed,
        "data": run.data["hash"],
    }
    return Subject(
        found.name, logits, text, bytes_of, found.folder, facts, lambda: RunAtAnyActive(found, model, logits)
    )


def _stock(
    path: Path, data: Path | None, sequences: int | None, tokenizer: Path | None, device: torch.device, folders: bool
) -> Subject:
    from mue.lab.trained.stock import StockCheckpoint

    if data is None:
        raise ValueError(
            f"{path} is a checkpoint of transformers, which holds no text: give --data, a file or a folder"
        )
    model = StockCheckpoint(path, device)
    tokens = model.tokens(tokenizer)
    text = text_of(
        data,
        {"tokenizer": str(tokens.path), "separator": tokens.end},
        made_with=[tokens.encoder.name],
        sequence=model.sequence,
        vocab=model.vocab,
        sequences=sequences or SEQUENCES,
        folders=folders,
    )
    folder, facts = Path("runs") / "eval" / path.resolve().name, {"model": model.name}
    return Subject(model.name, model.logits, text, tokens.bytes_of, folder, facts, lambda: model)
