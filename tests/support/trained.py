"""Small trained runs in folders of their own, as ``mue train`` leaves them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mue
from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.session import train
from mue.shapes import Transformer

BASE = mue.Dense(32, 32, 2, head_dim=16, sequence=32)
MOE = mue.MoE.parse("8e2a1s", width=32, expert=16, layers=2, head_dim=16, sequence=32)
SETTINGS = Settings(eval_sequences=16, log_every=10)
TUNED = mue.HParams(lr=0.02, weight_decay=0.1, init_std=0.1)


def trained(
    data: Path,
    out: Path,
    target: Transformer,
    *,
    keep: bool = True,
    steps: int = 20,
    settings: Settings = SETTINGS,
    **source: Any,
) -> Path:
    """Train a target on the text of a folder, in seconds.

    Args:
        keep: its weights. source: further keys of ``[data]``.

    Returns:
        The run's folder.
    """
    spec = {"source": [str(data)], "cache": str(out / "cache"), **source}
    corpus, training = open_corpus(spec), mue.Training(256, steps)
    base = replace(BASE, vocab=target.vocab)
    plan = mue.transfer(base, target, TUNED, base_training=training, training=training)
    run, store = Run(plan, settings, describe_data(spec, corpus)), Store(out)
    train(run, store, corpus, keep_weights=keep)
    return store.folder(run.key)


def moe_run_of_bytes(data: Path, out: Path, **more: Any) -> Path:
    """A MoE with a shared expert, on bytes."""
    return trained(data, out, MOE, **more)


def dense_run_of_words(data: Path, out: Path, **more: Any) -> Path:
    """A tied dense model, on the tokens of a byte-level tokenizer that is trained on the same text."""
    tokenizer = byte_level_tokenizer(data, out / "tokenizer.json")
    target = mue.Dense(32, 64, 2, head_dim=16, kv_heads=1, sequence=32, vocab=400, tied=True)
    return trained(data, out, target, tokenizer=str(tokenizer), **more)


def byte_level_tokenizer(data: Path, path: Path, vocab: int = 400) -> Path:
    """A tokenizer like GPT-2's, of so many tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(p) for p in sorted(data.rglob("*.py"))], trainer)
    tokenizer.save(str(path))
    return path
