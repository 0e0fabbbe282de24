"""A model's config as numbers: which of its attributes is the width, the number of experts, a number of heads.

Works on any config object with attributes, nested ones too; :mod:`mue.layouts.observe.names` has the words.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from mue.layouts.observe import names


def text_config(config: Any) -> Any:
    """The language model's part of a config: multimodal ones nest it.

    Args:
        config: of transformers, or any object with attributes.

    Returns:
        The nested config, or the config itself where it is the only one.
    """
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def subconfigs(config: Any) -> Iterator[Any]:
    """A config, then the ones nested in it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from subconfigs(value)


def integers(config: Any) -> dict[str, int]:
    """The sizes in a config: its whole numbers above 0.

    Args:
        config: any object with attributes.

    Returns:
        attribute → number; booleans, what is nested and what is private are left out.
    """
    # type, not isinstance: true is an int in Python
    return {k: v for k, v in vars(config).items() if type(v) is int and v > 0 and not k.startswith("_")}


def language_integers(config: Any) -> dict[str, int]:
    """The whole numbers of the language model's part and of what that nests; the innermost wins."""
    return {k: v for part in subconfigs(text_config(config)) for k, v in integers(part).items()}


def attributes(config: Any, dimension: str) -> list[str]:
    """The config's names for one of :data:`mue.layouts.observe.names.DIMENSIONS`, in its language part and what that nests."""
    words = names.DIMENSIONS[dimension]
    return [k for part in subconfigs(text_config(config)) for k in integers(part) if re.fullmatch(words, k)]


def size_of(config: Any, dimension: str) -> int | None:
    """A dimension's size; None where the config does not name it."""
    named = attributes(config, dimension)
    return language_integers(config)[named[0]] if named else None


def find_integer(config: Any, words: str) -> int | None:
    """The first whole number of the language part, and of what that nests, that one of ``words`` names."""
    return next((v for k, v in language_integers(config).items() if re.fullmatch(words, k)), None)


def with_active(config: Any, active: int) -> Any:
    """A copy of a config in which a token uses so many experts.

    Raises:
        ValueError: the config does not say how many it uses.
    """
    config, found = copy.deepcopy(config), False
    for part in subconfigs(text_config(config)):
        for key in integers(part):
            if re.fullmatch(names.ACTIVE_EXPERTS, key):
                setattr(part, key, active)
                found = True
    if not found:
        raise ValueError(f"{type(config).__name__} does not say how many experts a token uses")
    return config
