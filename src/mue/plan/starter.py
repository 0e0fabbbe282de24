"""A plan, sweep or train file to begin with: every line with a comment in plain words, and everything in it valid.

Text only. What a file means is for its readers to say (``mue.plan.toml``, ``mue.lab.sweep.spec``, ``mue.lab.train.spec``), and a test
has them read every variant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mue.plan.convention import Convention
from mue.plan.defaults import OF_TEXT
from mue.plan.key_words import KEY_WORDS, TABLE_WORDS
from mue.shapes import Block, Dense, HParams, Image, Mixed, MoE, Training, Transformer

KINDS = ("plan", "sweep", "train")
_AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)  # what a sweep tries, of a rate that somebody has in mind
_COMMON = ("head_dim", "heads", "kv_heads", "vocab", "sequence", "gated", "tied", "image")
_EXAMPLE = Training(batch=2**19, steps=25_000)  # in lines that are off
_WORDS_END = 44  # column of the comments, where lines are no longer


@dataclass(frozen=True)
class Starter:
    """What is known when a file is begun.

    Attributes:
        kind: one of :data:`KINDS`. base, target: shapes; a train file without a target trains its base.
        base_training, training: the tuned run and the target's.
        tuned: what ``[tuned]`` gives; empty: the values come from a sweep (``--tuned``). lr: in the middle of a sweep's.
        source: of the text. origins: where ``base`` and ``target`` come from, for the comment of their tables.
    """

    kind: str
    base: Transformer
    target: Transformer | None = None
    base_training: Training | None = None
    training: Training | None = None
    tuned: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 0.004
    source: str = ""
    origins: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The file."""
        lines = [
            f"# A {self.kind} file of mue: {self.use('FILE')}",
            *_line("rule", "complete-mue", TABLE_WORDS["rule"]),
        ]
        lines += self._shape("base", self.base, self.base_training)
        if self.kind == "sweep":
            lines += self._sweep()
        if self.tuned:
            lines += _table("tuned", TABLE_WORDS["tuned"])
            for key, value in HParams(**self.tuned).to_dict().items():
                if key != "roles":
                    lines += _line(key, 1.0 if value is None else value, KEY_WORDS["tuned"][key], off=value is None)
        if self.target is not None:
            lines += self._shape("target", self.target, self.training)
        if self.source:
            lines += self._lab()
        return "\n".join(lines) + "\n"

    def use(self, file: str) -> str:
        """The command that the file is for.

        Args:
            file: its name.
        """
        if self.kind == "sweep":
            more = f", then mue plan and mue train {file} --tuned runs/sweep" if self.target is not None else ""
            return f"mue sweep {file} -o runs/sweep{more}"
        return f"mue {self.kind} {file}{'' if self.tuned else ' --tuned FOLDER, of a sweep'}"

    def _shape(self, table: str, shape: Transformer, training: Training | None) -> Iterator[str]:
        origin = self.origins.get(table, "")
        yield from _table(table, TABLE_WORDS[table] + (f"; {origin}" if origin else ""))
        words = KEY_WORDS["shape"]
        yield from _line("width", shape.width, words["width"])
        if not isinstance(shape, Mixed):
            yield from _line("layers", shape.layers, words["layers"])
        if isinstance(shape, Dense):
            yield from _line("ffn", shape.ffn, words["ffn"])
        if isinstance(shape, MoE):
            yield from _experts(shape.blocks[0])
        for key in _COMMON:
            value = getattr(shape, key)
            if value is not None and not (shape.image is not None and key in OF_TEXT):
                yield from _line(key, asdict(value) if isinstance(value, Image) else value, words[key])
        if table == "base" and shape.output_multiplier != 1:
            yield from _line("output_multiplier", shape.output_multiplier, words["output_multiplier"])
        none = training is None  # both runs or neither: without them batch and duration are taken not to change
        yield from _table(f"{table}.training", words["training"], off=none)
        for key in ("batch", "steps"):
            number = getattr(training or _EXAMPLE, key)
            yield from _line(key, number, KEY_WORDS["training"][key], off=none)
        if table == "base" and self.kind != "sweep":
            yield from _table("base.convention", words["convention"], off=True)
            for f in fields(Convention):
                yield from _line(f.name, f.default, KEY_WORDS["convention"][f.name], off=True)
        if isinstance(shape, Mixed):
            for block in shape.blocks:
                yield from _table(f"[{table}.blocks]", words["blocks"])
                yield from _line("layers", block.layers, words["layers"])
                yield from _experts(block) if block.ffn is None else _line("ffn", block.ffn, words["ffn"])

    def _sweep(self) -> Iterator[str]:
        words = KEY_WORDS["sweep"]
        yield from _table("sweep", TABLE_WORDS["sweep"])
        yield from _line("lr", [float(f"{self.lr * factor:.3g}") for factor in _AROUND], words["lr"])
        yield from _line("weight_decay", [0.1], words["weight_decay"])
        yield from _line("init_std", [0.05, 0.1], words["init_std"])
        yield from _line("betas", [[0.9, 0.95], [0.8, 0.9]], words["betas"], off=True)
        yield from _line("seeds", [0], words["seeds"])
        yield from _line("sampler", "grid", words["sampler"])
        yield from _line("stop_early", False, words["stop_early"])

    def _lab(self) -> Iterator[str]:
        yield from _table("data", TABLE_WORDS["data"])
        yield from _line("source", self.source, KEY_WORDS["data"]["source"])
        yield from _line("tokenizer", "tokenizer.json", KEY_WORDS["data"]["tokenizer"], off=True)
        yield from _table("run", TABLE_WORDS["run"])
        for key, value in (("schedule", "wsd"), ("decay", 0.2), ("precision", "fp32"), ("balance", "bias")):
            yield from _line(key, value, KEY_WORDS["run"][key])
        if self.kind == "train":
            yield from _line("seed", 0, KEY_WORDS["run"]["seed"])


def proposed_base(target: Transformer) -> Dense:
    """A dense model to tune in the place of a target that is too large for it: an eighth as wide, at least two heads, and alike otherwise.

    Args:
        target: whose head size, vocabulary, sequence and activation it has; of its depth at most 8 layers.
    """
    width = max(2, target.width // 8 // target.head_dim) * target.head_dim
    names = ("head_dim", "vocab", "sequence", "gated", "tied", "image")
    return Dense(width, width, min(8, target.layers), **{name: getattr(target, name) for name in names})


def _experts(block: Block) -> Iterator[str]:
    """The keys of a block with experts; what no file has to say is left out."""
    words = KEY_WORDS["shape"]
    yield from _line("moe", block.notation, words["moe"])
    yield from _line("expert", block.expert, words["expert"])
    if block.shared is not None:
        yield from _line("shared", block.shared, words["shared"])
    router = {"name": block.router, **block.router_settings} if block.router_settings else block.router
    yield from _line("router", router, words["router"])
    yield from _line("normalize", block.normalize, words["normalize"])
    if block.gate_moments is not None:
        yield from _line("gates", block.gates, words["gates"])
        yield from _line("gate_moments", list(block.gate_moments), words["gate_moments"])


def _table(name: str, words: str, *, off: bool = False) -> Iterator[str]:
    yield ""
    said = f"{'# ' if off else ''}[{name}]"
    yield f"{said:<{_WORDS_END}} # {words}"


def _line(key: str, value: Any, words: str, *, off: bool = False) -> Iterator[str]:
    """One key with its comment; ``off``: as a comment itself, to be taken in by whoever wants it."""
    said = f"{'# ' if off else ''}{key} = {toml_value(value)}"
    yield f"{said:<{_WORDS_END}} # {words}"


def toml_value(value: Any) -> str:
    """A value as TOML has it, on one line.

    Args:
        value: text, number, true or false, or lists and tables of such.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return repr(value)
