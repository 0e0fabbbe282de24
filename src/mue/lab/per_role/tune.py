"""``mue tune-roles``: the per-role search on a base, from its file to its folder. Every run is in the store, under its key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mue.lab.data import Data
from mue.lab.data.spec import data_source, describe_data
from mue.lab.per_role.search import Candidate, RolesResult, Search, multipliers, search
from mue.lab.per_role.space import coordinates, with_multipliers
from mue.lab.runners.listener import ListenerOf
from mue.lab.runners.run_all import run_all
from mue.lab.sweep.spec import base_plan
from mue.lab.sweep.state import RESULT_FILE
from mue.lab.train.provenance import provenance
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.spec import settings_from
from mue.lab.train.task import task_of
from mue.plan.toml import TABLES, check_keys, shape_from, table_of, training_from, tuned_from
from mue.shapes import HParams, Training, Transformer
from mue.shapes.hparams import THIRDS, third_and_role
from mue.util.files import digest, write_json, write_text


@dataclass(frozen=True)
class RolesSpec:
    """A per-role search: the base and its run, the values tuned for all roles together, settings, data.

    Attributes:
        search: of ``[roles]``. settings: of every run, but for the seed. source: as
            :func:`mue.lab.data.spec.open_data` takes it.
    """

    base: Transformer
    training: Training
    tuned: HParams
    search: Search
    settings: Settings
    source: dict[str, Any]

    def identity(self, data_hash: str) -> dict[str, Any]:
        """What must not change under a search's folder."""
        settings = {k: v for k, v in self.settings.to_dict().items() if k != "seed"}
        return {
            "base": self.base.to_dict(),
            "training": self.training.to_dict(),
            "tuned": self.tuned.to_dict(),
            "search": {**asdict(self.search), "numbers": list(self.search.numbers)},
            "settings": settings,
            "data": data_hash,
        }


def roles_from(data: Mapping[str, Any], folder: Path, tuned: HParams | None = None) -> RolesSpec:
    """Read a file: ``[base]`` with ``[base.training]``, ``[tuned]``, ``[data]``, optionally ``[roles]`` and ``[run]``.

    Args:
        data: the file's tables. folder: the file's. tuned: values in place of ``[tuned]``, from a finished sweep.

    Raises:
        ValueError: a table or key is missing, unknown or out of its range.
    """
    check_keys(data, TABLES, "the file's top level")
    base = table_of(data, "base")
    if "convention" in base:
        raise ValueError(
            "[base.convention] describes a base tuned elsewhere; here the lab trains its own: leave it out"
        )
    training = training_from(base, "base")
    if training is None:
        raise ValueError("tuning roles needs [base.training] with batch (tokens per step) and steps")
    if tuned is None:
        if "tuned" not in data:
            raise ValueError(
                "the file needs a [tuned] table (or mue tune-roles --tuned SWEEP): roles are tuned around it"
            )
        tuned = tuned_from(table_of(data, "tuned"))
    if tuned.roles:
        raise ValueError("[tuned.roles] is what this search looks for: leave it out")
    table = table_of(data, "roles")
    check_keys(table, tuple(f.name for f in fields(Search)), "[roles]")
    search = Search(**table)
    if not tuned.weight_decay:  # a multiple of nothing
        search = replace(search, numbers=tuple(n for n in search.numbers if n != "weight_decay"))
    settings = settings_from(data)
    return RolesSpec(
        base=shape_from(base, "base", ("training", "output_multiplier")),
        training=training,
        tuned=tuned,
        search=search,
        settings=settings,
        source=data_source(data, folder, task_of(settings).reads),
    )


def tune_roles(
    spec: RolesSpec,
    out: Path,
    corpus: Data,
    listener_of: ListenerOf,
    *,
    workers: int | None = None,
    checkpoint_seconds: float = 10.0,
) -> RolesResult:
    """Search, and write ``out/result.json`` (which ``--tuned`` reads) and ``out/tuned.toml``. Finished runs are not run again.

    Args:
        out: the search's folder. corpus: opened from ``spec.source``. listener_of: told of each batch of runs.
        workers: processes (None: one for each core). checkpoint_seconds: time between a run's checkpoints.

    Raises:
        ValueError: the folder belongs to another search; the base diverges. mue.lab.train.run.BusyError: it is being searched.
    """
    data, count = describe_data(spec.source, corpus), set[str]()
    space = coordinates(spec.base, spec.search.numbers, thirds=spec.search.thirds)
    plan = base_plan(spec.base, spec.training, spec.tuned)
    task_of(spec.settings).batches_of(Run(plan, spec.settings, data), corpus)  # before the folder is made
    store = _own_folder(out, spec.identity(corpus.hash))

    def train(title: str, jobs: Sequence[Candidate]) -> list[float]:
        runs = [
            Run(base_plan(spec.base, spec.training, tuned), replace(spec.settings, seed=seed), data)
            for tuned, seed in jobs
        ]
        keys = [run.key for run in runs]
        count.update(keys)
        with listener_of(title, runs) as listener:
            results = run_all(
                runs,
                store,
                workers=workers,
                checkpoint_seconds=checkpoint_seconds,
                listener=listener,
            )
        losses = (results[key]["val_loss"] for key in keys)
        return [math.inf if loss is None else loss for loss in losses]

    with store.locked("roles"):
        found = search(spec.tuned, space, spec.search, train)
        tuned = with_multipliers(spec.tuned, space, found.result)
        write_json(out / RESULT_FILE, result_of(found, spec, tuned, corpus.hash, len(count)))
        write_text(out / "tuned.toml", tuned_toml(tuned, found.verdict))
    return found


def _own_folder(out: Path, own: dict[str, Any]) -> Store:
    """The search's folder, new or its own."""
    path = out / "roles.json"
    if not path.exists():
        write_json(path, {"identity": own})
        return Store(out)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["identity"]
        wrong = [k for k in own if digest(stored.get(k)) != digest(own[k])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another folder with --out, or remove it") from error
    if wrong:
        raise ValueError(f"{out} holds another search ({', '.join(wrong)} differ): choose another folder with --out")
    return Store(out)


def result_of(found: RolesResult, spec: RolesSpec, tuned: HParams, data_hash: str, runs: int) -> dict[str, Any]:
    """What ``result.json`` of a search holds; ``tuned`` and ``identity`` as in a sweep's, so that ``--tuned`` reads it."""
    confirmed = found.confirmed
    return {
        "tuned": tuned.to_dict(),
        "verdict": found.verdict,
        "runs": runs,
        "coordinates": [coordinate.label for coordinate in found.space],
        "rounds": [made.to_dict() for made in found.rounds],
        "multipliers": multipliers(found),
        "confirmed": None
        if confirmed is None
        else {
            "holds": confirmed.holds,
            "losses": {arm: [x if math.isfinite(x) else None for x in ys] for arm, ys in confirmed.losses.items()},
            "best": confirmed.best,
            "gain": confirmed.gain.to_dict(),
            "gain_on_best": confirmed.on_best.to_dict(),
        },
        "identity": spec.identity(data_hash),
        **provenance(),
    }


def tuned_toml(tuned: HParams, verdict: str) -> str:
    """The tuned values as the ``[tuned]`` tables of a plan file, under the verdict as a comment."""
    values = {k: v for k, v in tuned.to_dict().items() if k != "roles" and v is not None}
    lines = [f"# mue tune-roles: {verdict}", "[tuned]", *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    for third in ("", *THIRDS):
        rows = {third_and_role(w)[1]: table for w, table in tuned.roles.items() if third_and_role(w)[0] == third}
        if rows:
            lines += ["", f"[tuned.roles{third and '.'}{third}]"]
        for role, table in rows.items():
            lines.append(f"{role} = {{ {', '.join(f'{k} = {v:g}' for k, v in table.items())} }}")
    return "\n".join(lines) + "\n"
