"""Which numbers of a plan nobody gave: the defaults in force, for a reader who has others in mind.

A file says what it gives, so of a plan that was read from one this is known. Objects of Python look the same with a default that
was given and one that was not, and a saved plan has all of its numbers; of those nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mue.plan.plan import Inputs
from mue.shapes import HParams, Transformer
from mue.util.text import below_one

# Numbers of a shape with defaults that a model may well have otherwise.
_OF_SHAPES = ("head_dim", "kv_heads", "vocab", "sequence", "gated", "tied")
OF_TEXT = ("vocab", "sequence", "tied")
"""What of a shape has no meaning, or follows from the rest, where it draws images."""
_OF_EXPERTS = ("router", "normalize")


def given_in(data: Mapping[str, Any]) -> frozenset[str]:
    """What a plan file gives, as dotted keys: ``"tuned.betas"``; a router of a block counts where every block with experts has one.

    Args:
        data: the file's tables.
    """
    found = set(data)
    for name in ("base", "target", "tuned"):
        table = data.get(name, {})
        found |= {f"{name}.{key}" for key in table}
        if blocks := [block for block in table.get("blocks", ()) if "ffn" not in block]:
            found |= {f"{name}.{key}" for key in _OF_EXPERTS if all(key in block for block in blocks)}
    return frozenset(found)


def not_given(inputs: Inputs) -> str:
    """The defaults in force, by table; empty where everything was given, or where nobody knows what was.

    Args:
        inputs: of a plan; ``given`` says what the file had.
    """
    if inputs.given is None:
        return ""
    lines = []
    if "rule" not in inputs.given:
        lines.append(f"rule {inputs.rule}")
    shapes = [(name, shape) for name, shape in (("base", inputs.base), ("target", inputs.target))]
    for name, shape in shapes:
        if isinstance(shape, Transformer):
            lines.append(_line(f"[{name}]", _of_shape(name, shape, inputs.given)))
    if inputs.tuned is not None:
        lines.append(_line("[tuned]", _of_tuned(inputs.tuned, inputs.given)))
    if inputs.training is None:
        lines.append("training: neither run, so batch and duration are taken not to change")
    return "; ".join(line for line in lines if line)


def differing(inputs: Inputs) -> tuple[str, ...]:
    """What the base's table gives and the target's leaves out, where the default in force is another: most often an oversight.

    Args:
        inputs: of a plan; ``given`` says what the file had, and without it nothing is claimed.

    Returns:
        A sentence for each such key, with both values.
    """
    base, target, given = inputs.base, inputs.target, inputs.given
    if given is None or not isinstance(base, Transformer):
        return ()
    before = _values(base)
    differ = {key: value for key, value in _values(target).items() if key in before and before[key] != value}
    if base.num_heads * target.num_kv_heads == target.num_heads * base.num_kv_heads:
        differ.pop("kv_heads", None)  # as many queries to a key head as before, in a model of more heads
    return tuple(
        f"[target] {key} is not given and {_text(value)}, [base] has {_text(before[key])}: say which"
        for key, value in differ.items()
        if _gives(given, "base", key) and not _gives(given, "target", key)
    )


def _gives(given: frozenset[str], table: str, key: str) -> bool:
    return f"{table}.{key}" in given or (key == "head_dim" and f"{table}.heads" in given)  # heads imply the head size


def _values(shape: Transformer) -> dict[str, Any]:
    """Key → value in force, of the keys with defaults that mean something for this shape."""
    experts = [block for block in shape.blocks if block.experts]
    found = {
        name: shape.num_kv_heads if name == "kv_heads" else getattr(shape, name)
        for name in _OF_SHAPES
        if shape.image is None or name not in OF_TEXT
    }
    return found | ({name: getattr(experts[0], name) for name in _OF_EXPERTS} if experts else {})


def _line(table: str, defaults: Iterator[str]) -> str:
    found = ", ".join(defaults)
    return f"{table} {found}" if found else ""


def _of_shape(table: str, shape: Transformer, given: frozenset[str]) -> Iterator[str]:
    for name, value in _values(shape).items():
        if not _gives(given, table, name):
            yield f"{name} {_text(value)}"


def _of_tuned(tuned: HParams, given: frozenset[str]) -> Iterator[str]:
    for name in tuned.to_dict():  # without what only other optimizers have
        if name != "roles" and f"tuned.{name}" not in given and "tuned" in given:
            yield f"{name} {_text(getattr(tuned, name))}"
    if tuned.optimizer == "muon" and tuned.adamw_lr is None and "tuned" in given:
        yield f"adamw_lr {_text(tuned.lr)}, as lr"


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(below_one(x) if isinstance(x, float) else _text(x) for x in value)})"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
