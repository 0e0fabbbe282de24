"""Step Law, arXiv 2503.04715: github.com/step-law/steplaw, ``data/moe_lr_bs_loss.csv`` and ``data/dense_lr_bs_loss.csv``.

No licence is given there, so the files are not kept here: the command takes their paths and checks their sums (of commit 32a8f4c).
AdamW, one learning rate for every tensor, final rate 1e-5 in every run (``mlr`` in ``exp_name``), one seed. Weight decay 0.1,
2,000 steps of warmup and cosine decay are the paper's, whose body we could not open again: from memory, and not in the files.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from public.cells import PublishedRun, Shape, read_checked

SHA256 = {
    "moe": "653d585244a7b227423007e8b796bc16d76f6d24eb87b1919b8f048a91897b92",
    "dense": "9e46181076c04d450294d75dfe6f72adc416e231e154a07b337e378f9410002c",
}
SEQUENCE = 2048
FINAL_LR = 1e-5
WEIGHT_DECAY = 0.1


def read(kind: str, path: Path, sha256: str | None = None) -> list[PublishedRun]:
    """The runs of one file.

    Args:
        kind: ``"moe"`` or ``"dense"``. path: the file as its owner publishes it. sha256: of a later version of it.

    Raises:
        ValueError: another file, or one without the columns that are read.
    """
    rows = csv.DictReader(io.StringIO(read_checked(path, sha256 or SHA256[kind])))
    shape = _moe if kind == "moe" else _dense
    try:
        return [
            PublishedRun(
                shape=shape(row),
                tokens=float(row["D"]),
                batch=float(row["bs"]) * SEQUENCE,  # published in sequences
                lr=float(row["lr"]),
                loss=float(row["smooth loss"]),
            )
            for row in rows
        ]
    except KeyError as missing:
        raise ValueError(f"{path} has no column {missing}: is it the {kind} file of step-law/steplaw?") from missing


def _dense(row: dict[str, str]) -> Shape:
    width, layers, ffn, params = int(row["h"]), int(row["numl"]), int(row["ffnh"]), float(row["N"])
    return Shape(f"d{width} L{layers}", width, layers, ffn, params, params)


def _moe(row: dict[str, str]) -> Shape:
    """There ``N`` counts the whole model and ``Na`` what a token meets, both without embeddings; ``sed`` is the shared width."""
    chosen, expert, shared = int(row["topk"]), int(row["moeh"]), int(row["sed"])
    return Shape(
        name=row["moe_name"],
        width=int(row["h"]),
        layers=int(row["numl"]),
        active_width=chosen * expert + shared,
        total=float(row["N"]),
        active=float(row["Na"]),
        experts=int(row["nume"]),
        chosen=chosen,
        expert=expert,
        shared=shared,
    )
