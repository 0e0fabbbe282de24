"""A user's own function or class by name: ``file.py:name``, ``module:name`` or ``package.module.Name``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from mue.util.errors import nearest


def imported(name: str) -> Any:
    """What a name stands for. The file or module runs, so a user's own code has to be meant.

    Args:
        name: ``file.py:name``, ``module:name`` or ``package.module.Name``.

    Raises:
        ValueError: no such file, module or attribute, with the nearest one.
    """
    where, _, attribute = name.rpartition(":" if ":" in name else ".")
    if where.endswith(".py"):
        path = Path(where)
        spec = importlib.util.spec_from_file_location(f"_mue_{path.stem}", path)
        if not path.exists() or spec is None or spec.loader is None:
            raise ValueError(f"{where} does not exist; give MODEL as file.py:function or module:function")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where its dataclasses look for themselves
        spec.loader.exec_module(module)
    else:
        if "" not in sys.path:
            sys.path.insert(0, "")  # a module in the folder that the command was given in
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"{where} cannot be imported ({error}); give MODEL as file.py:function") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{where} has no {attribute!r}{nearest(attribute, [n for n in vars(module) if n[:1] != '_'])}")
    return getattr(module, attribute)
