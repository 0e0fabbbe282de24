"""What ``mue inspect`` may be given: a family, a config, a checkpoint folder, or a class or function of the user's."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import torch
from torch import nn

from mue.layouts.diffusers.config import build_image, image_config, is_diffusers
from mue.layouts.diffusers.stock import describe_images
from mue.layouts.layout import HasLayout, Layout, canonical, chain_steps, pattern_of, unwrap
from mue.layouts.observe.axis_sizes import Build
from mue.layouts.observe.describe import Description, ParamPattern
from mue.layouts.transformers.configs import build, config_of, read_config
from mue.layouts.transformers.describe import describe_config
from mue.layouts.transformers.disk import has_weights
from mue.layouts.transformers.stock import eager
from mue.util.errors import nearest
from mue.util.files import read_text
from mue.util.importing import imported, not_taken, user_code


@dataclass(frozen=True)
class Source:
    """A model by its config and what builds it; ``declared`` where it says itself what its parameters are.

    Attributes:
        config: None where a declared model has none. rows: the user's rows, which win.
        folder: of the checkpoint, where there are weights to compare with. instance: the very model that was given.
        observe: what describes a config, with the user's rows; None: as models of tokens are described.
    """

    name: str
    config: Any
    build: Build
    rows: tuple[Layout, ...] = ()
    declared: nn.Module | None = None
    folder: Path | None = None
    instance: nn.Module | None = None
    observe: Callable[[Any, Sequence[Layout]], Description] | None = None

    def model(self) -> nn.Module:
        """The model that was given, or else one on the meta device."""
        own = self.instance if self.declared is None else self.declared
        if own is not None:
            return own
        with torch.device("meta"):
            return self.build(self.config)

    def describe(self, config: Any = None) -> Description:
        """Every parameter's row; of the same model with another config where one is given."""
        if self.declared is None:
            with user_code(self.name):
                of = self.config if config is None else config
                if self.observe is not None:
                    return self.observe(of, self.rows)
                return describe_config(of, self.rows, self.build)
        with user_code(f"{self.name}.layout"):
            table = list(self.declared.layout())  # type: ignore[operator]
        return _declared(self.declared, table)


def _declared(model: nn.Module, table: Sequence[Layout]) -> Description:
    """A model as its own table has it: parameters of one pattern have one row, or the pattern of each row."""
    shapes = {canonical(n): tuple(p.shape) for n, p in model.named_parameters()}
    rows = {n: next((r for r in table if r.regex.fullmatch(n)), None) for n in shapes}
    steps = chain_steps(model)
    found: dict[str, set[Layout | None]] = {}
    for name, row in rows.items():
        found.setdefault(pattern_of(name, steps), set()).add(row)
    names: dict[str, str] = {}
    patterns: dict[str, ParamPattern] = {}
    for name, row in rows.items():
        pattern = pattern_of(name, steps)
        names[name] = row.pattern if row is not None and len(found[pattern]) > 1 else pattern
        how = "declared by the model" if row else "the model's layout has no row"
        patterns.setdefault(names[name], ParamPattern(names[name], shapes[name], row, how))
    return Description(tuple(patterns.values()), names=names)


def source_of(given: str | Path | Any, rows: Sequence[Layout] = (), config: str | Path | None = None) -> Source:
    """Read a source.

    Args:
        given: a model, a config, a family's name, a ``config.json``, a folder that holds one; ``file.py:name``, ``module:name``
            or ``package.module.Class``: a model's class, or a function without arguments that returns a model or a config.
        rows: the user's own rows.
        config: for a class that needs one: a JSON file; with a ``model_type``, a transformers config.

    Raises:
        ValueError: nothing of the kind; a class without a config; a model that neither declares its parameters nor comes
            with a config to build it again.
    """
    if isinstance(given, nn.Module):
        return _of_model(given, rows)
    if given is None or isinstance(given, tuple | list | int | float):
        raise ValueError(f"a {type(given).__name__} is neither a model nor a config: give, or return, the model alone")
    if not isinstance(given, str | Path):
        # a copy: building it sets how attention is computed, and the config may be the user's model's
        return Source(type(given).__name__, copy.deepcopy(given), build, tuple(rows))
    path = Path(given)
    if path.exists() or not _is_code(str(given)):
        found = read_config(given)
        folder = path if path.is_dir() and has_weights(path) else None
        return Source(type(found).__name__, found, build, tuple(rows), folder=folder)
    made = imported(str(given))
    if isinstance(made, type) and issubclass(made, nn.Module):
        return _of_class(made, rows, config)
    if not callable(made):
        raise ValueError(f"{given} is a {type(made).__name__}: give a class of models, or a function that builds one")
    if why := not_taken(made):
        raise ValueError(f"{given} is called without arguments, which it does not take ({why})")
    with torch.device("meta"), user_code(str(given)):
        result = made()
    result = result.get("model", result) if isinstance(result, dict) else result
    return _of_model(result, rows, str(given)) if isinstance(result, nn.Module) else source_of(result, rows)


def _is_code(name: str) -> bool:
    # module:name and package.Class are code; a path has slashes, a family's name neither dot nor colon
    return ":" in name or (name.count(".") >= 1 and "/" not in name and not name.endswith(".json"))


def _of_class(kind: type[nn.Module], rows: Sequence[Layout], config: str | Path | None) -> Source:
    if is_diffusers(kind):
        return _of_images(kind, {} if config is None else _json_object(Path(config)), rows, str(config))
    if config is None:
        default = getattr(kind, "config_class", None)
        if default is None:
            raise ValueError(f"{kind.__name__} is a class: give --config, a JSON file with the config it is built from")
        with user_code(kind.__name__):
            own = default()
        return _with_class(kind, own, rows)
    data = _json_object(Path(config))
    if "model_type" in data:
        return _with_class(kind, config_of(data, str(config)), rows)
    made = _config_class(kind)
    if made is not None:
        numbers = _known(made, data, config)
        with user_code(f"{config} as {made.__name__}"):
            own = made(**numbers)
        return _with_class(kind, own, rows)
    own = _Config(_file=str(config), **data)
    if not _takes_keywords(kind):
        return _with_class(kind, own, rows)
    _known(kind, data, config)
    return _with_class(kind, own, rows, lambda c: kind(**{k: v for k, v in vars(c).items() if k != "_file"}))


def _of_images(kind: type[nn.Module], given: Mapping[str, Any], rows: Sequence[Layout], where: str) -> Source:
    """A class of ``diffusers``, built from keywords; what is not given is as its class has it."""
    build, observe = functools.partial(build_image, kind), functools.partial(describe_images, kind)
    every = dict.fromkeys([*rows, *getattr(kind, "layout_rows", ())])
    return Source(kind.__name__, image_config(kind, given, where), build, tuple(every), observe=observe)


class _Config(SimpleNamespace):
    """What a JSON file holds as attributes, for a class that does not say what its config is."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{vars(self).get('_file', 'the config')} has no {name!r}")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_text(path))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, and a config is an object: {{...}}")
    return data


def _config_class(kind: type[nn.Module]) -> Any:
    """The class that a model's first argument is declared to be (``def __init__(self, config: MyConfig)``); None where it says nothing."""
    [_, *parameters] = inspect.signature(kind.__init__).parameters
    try:
        said = get_type_hints(kind.__init__).get(parameters[0]) if parameters else None
    except NameError:  # a name for type checkers only
        return None
    return said if isinstance(said, type) and said.__module__ not in ("builtins", "typing", "types") else None


def _takes_keywords(kind: type[nn.Module]) -> bool:
    """Is the class built from numbers by name (``width, layers, ...``), and not from one object?"""
    [_, *parameters] = inspect.signature(kind.__init__).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) != 1


def _known(made: Any, data: dict[str, Any], config: str | Path) -> dict[str, Any]:
    """The data, if ``made`` takes and has all of it; a misspelt or missing key is named here, not by an error of Python's."""
    parameters = inspect.signature(made).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in data:
            if key not in names:
                raise ValueError(f"{config}: {made.__name__} knows no {key!r}{nearest(key, names)}")
    lacking = [p.name for p in parameters if p.name in names and p.default is p.empty and p.name not in data]
    if lacking:
        raise ValueError(f"{config} lacks {', '.join(map(repr, lacking))}, which {made.__name__} needs")
    return data


def _with_class(kind: Any, config: Any, rows: Sequence[Layout], build: Build | None = None) -> Source:
    make: Build = build or (eager(kind) if hasattr(config, "model_type") and hasattr(config, "to_dict") else kind)
    with torch.device("meta"), user_code(kind.__name__):
        model = make(config)
    if isinstance(model, HasLayout):
        return _of_model(model, rows)
    every = dict.fromkeys([*rows, *getattr(model, "layout_rows", ())])
    return Source(kind.__name__, config, make, tuple(every))


def _of_model(model: nn.Module, rows: Sequence[Layout], builder: str = "FILE.py:FUNCTION") -> Source:
    inner = unwrap(model)
    kind: Any = type(inner)
    own = getattr(inner, "config", None)
    if isinstance(inner, HasLayout):
        if rows:
            raise ValueError(f"{kind.__name__} declares its own layout: put your rows there")
        return Source(kind.__name__, own, build, declared=inner)
    if own is None:
        raise ValueError(
            f"{kind.__name__} has neither a layout() that declares its parameters nor a config to build it again: add one"
            f" (mue inspect {builder} --propose prints a layout())"
        )
    if is_diffusers(kind):
        own_rows = (*rows, *getattr(inner, "layout_rows", ()))
        return replace(_of_images(kind, own, own_rows, "its config"), instance=inner)
    return replace(_with_class(kind, own, (*rows, *getattr(inner, "layout_rows", ()))), instance=inner)
