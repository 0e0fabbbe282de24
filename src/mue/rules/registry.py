"""Every rule by name. A rule is one file: a function that returns its table, registered here, with its options as keywords.

What an option means stands in ``mue.rules.options``, where a rule adds one that no other has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from mue.rules.options import OptionValue, resolve
from mue.rules.table import Rule
from mue.util.registry import Registry

RULES: Registry[Callable[..., Rule]] = Registry("rule", home="mue.rules")


def get_rule(name: str, depth_exponent: object = None, **options: object) -> Rule:
    """The rule of that name with its options resolved.

    Args:
        name: from :data:`RULES`. depth_exponent, options: from :data:`mue.rules.options.OPTIONS`; None stands for the rule's default.

    Returns:
        The rule's table. Tables are immutable, so the same one is given to all who ask for it.

    Raises:
        ValueError: an unknown name, or an option that the rule does not have.
    """
    builder = RULES.lookup(name)
    return _built(builder, tuple(resolve(name, builder, {"depth_exponent": depth_exponent, **options}).items()))


@lru_cache(maxsize=256)
def _built(builder: Callable[..., Rule], options: tuple[tuple[str, OptionValue], ...]) -> Rule:
    return replace(builder(**dict(options)), options=dict(options))
