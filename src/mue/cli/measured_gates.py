"""What ``mue plan FILE --measure-gates`` does before it plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from mue.cli.app import with_sweep
from mue.cli.files import read_tables
from mue.plan.toml import PLAN_TABLES, plan_inputs, table_of
from mue.plan.toml_edit import write_keys
from mue.util.text import text_table


def write_measured_gates(file: Path, tuned: Path | None) -> None:
    """Measure a file's routers, tell what was seen, and write the moments of those whose weights do not sum to one.

    Args:
        file: with a ``[data]`` table. tuned: a sweep's folder, as for the plan.

    Raises:
        ValueError: what the file lacks or has wrong; nothing is written then.
    """
    from mue.lab.data.spec import data_source, open_corpus
    from mue.lab.train.gate_moments import by_layer, measure_gates, needs_measuring, table_of_gates
    from mue.lab.train.spec import settings_from

    data, values = with_sweep(read_tables(file, None, (*PLAN_TABLES, "data", "run")), tuned)
    target = table_of(data, "target")
    if "image" in target:
        raise ValueError(
            "--measure-gates measures on text, and [target] draws images: give gate_moments by hand, or take a router whose weights sum to"
            " one or whose moments are known (expert-choice)"
        )
    source, settings = data_source(data, file.parent), settings_from(data, auto="fp32")
    blocks = target.get("blocks")
    tables: list[Any] = [target] if blocks is None else blocks if isinstance(blocks, list) else []
    wanted = {i for i, table in enumerate(tables) if isinstance(table, dict) and needs_measuring(table)}
    for i in wanted:
        # to begin with any moments will do, and they are none that a file should keep
        tables[i] |= {"gates": "measured", "gate_moments": [1.0, 1.0]}
    inputs = plan_inputs({k: v for k, v in data.items() if k in PLAN_TABLES}, values)
    layers = measure_gates(inputs, settings, open_corpus(source))
    told = Console(stderr=True, soft_wrap=True)
    told.print(text_table(*table_of_gates(inputs.target, layers)), highlight=False)
    first, places = 0, {}
    for i, table in enumerate(tables):
        end = inputs.target.layers if blocks is None else first + table["layers"]
        if i in wanted:
            pairs = by_layer(inputs.target, [one for one in layers if first <= one.layer < end])
            written = [f"[{m1!r}, {m2!r}]" for m1, m2 in pairs]
            moments = written[0] if len(written) == 1 else f"[{', '.join(written)}]"
            places[i] = {"gates": '"measured"', "gate_moments": moments}
        first = end
    if not places:
        told.print("Their weights sum to one for every token, which the rule takes as it is: nothing is written.")
        return
    write_keys(file, "[target]" if blocks is None else "[[target.blocks]]", places)
    told.print(f"Written into {file}.")
