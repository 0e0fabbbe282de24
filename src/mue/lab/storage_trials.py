"""The trials of one sweep: one for each point, claimed by one worker at a time, counted once.

A trial waits, is claimed (RUNNING, with its worker's name and a sign of life), and ends. A worker that gives no sign of life
for a *lease* has lost its trial: whoever asks next takes it over, and what the first says of it later is refused. All
times are the storage's own clock; each method is one transaction, safe to repeat.

A point (learning rate, weight decay, ..., seed) has one trial however many workers add it, and however often.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from mue.lab.storage import Database

LEASE = 60.0
Point = dict[str, float]
State = Literal["WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL"]
OPEN = ("WAITING", "RUNNING")

_NOW = {True: "strftime('%Y-%m-%d %H:%M:%f000', 'now')", False: "timezone('utc', clock_timestamp())"}
_AGO = {
    True: "strftime('%Y-%m-%d %H:%M:%f000', 'now', '-' || :lease || ' seconds')",
    False: "timezone('utc', clock_timestamp()) - make_interval(secs => :lease)",
}
_QUIET = {
    True: "(julianday('now') - julianday(h.heartbeat)) * 86400",
    False: "extract(epoch from timezone('utc', clock_timestamp()) - h.heartbeat)",
}
_WAITING = (
    "SELECT t.trial_id, t.number FROM trials t WHERE t.study_id = :study AND t.state = 'WAITING' AND EXISTS"
    " (SELECT 1 FROM trial_user_attributes p WHERE p.trial_id = t.trial_id AND p.key = 'point') ORDER BY t.trial_id LIMIT 1"
)
_LOST = (
    "SELECT t.trial_id, t.number FROM trials t JOIN trial_heartbeats h ON h.trial_id = t.trial_id"
    " WHERE t.study_id = :study AND t.state = 'RUNNING' AND h.heartbeat < {ago} ORDER BY t.trial_id LIMIT 1"
)
_ATTRIBUTE = (
    "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (:trial, :key, :value)"
    " ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json"
)


@dataclass(frozen=True)
class Trial:
    """A trial as the storage has it.

    Attributes:
        point: the values and the seed. result: of an ended one, as ``mue.lab.run`` stores it, else None.
        owner: the worker that has it or had it last. progress: step and loss as the owner last said.
        quiet: seconds since the owner's last sign of life.
    """

    id: int
    number: int
    state: State
    point: Point
    result: dict[str, Any] | None = None
    owner: str | None = None
    progress: dict[str, Any] | None = None
    quiet: float | None = None

    @property
    def seed(self) -> int:
        return int(self.point["seed"])

    @property
    def loss(self) -> float:
        """The validation loss of a completed trial; inf where it has none: it diverged, was stopped, has not ended."""
        loss = (self.result or {}).get("val_loss") if self.state == "COMPLETE" else None
        return math.inf if loss is None else float(loss)


def name_of(point: Mapping[str, float]) -> str:
    """What a point is told apart by: blind to the last bits, which differ between machines that compute a grid."""
    return " ".join(f"{k}={point[k]:.12g}" for k in sorted(point))


class Trials:
    """The trials of the study ``name`` in ``database``.

    ``lease``: seconds without a sign of life after which a worker has lost its trial; the first worker of a sweep says it,
    the others find it (None). ``ValueError`` where they differ.
    """

    def __init__(self, database: Database, name: str, lease: float | None = None) -> None:
        self.database, self.study = database, database.study(name)
        self.ended: dict[int, Trial] = {}
        stored = float(json.loads(database.run(lambda c: self._agreed(c, lease))))
        if lease is not None and lease != stored:
            raise ValueError(f"this sweep's first worker set a lease of {stored:g} s, not {lease:g}: leave --lease out")
        self.lease = stored

    def add(self, points: Sequence[Point], *, limit: int | None = None) -> int:
        """One waiting trial for each point that has none, at most up to ``limit`` trials in all; returns how many."""

        def work(c: sa.Connection) -> int:
            self._execute(c, "SELECT study_id FROM studies WHERE study_id = :study" + self._lock())
            rows = self._execute(
                c,
                "SELECT a.value_json FROM trials t JOIN trial_user_attributes a ON a.trial_id = t.trial_id"
                " WHERE t.study_id = :study AND a.key = 'point'",
            )
            known = {name_of(json.loads(text)) for (text,) in rows}
            new = {name: p for p in points if (name := name_of(p)) not in known}
            kept = list(new.values())[: None if limit is None else max(0, limit - len(known))]
            if kept:
                self._insert(c, kept)
            return len(kept)

        return self.database.run(work)

    def claim(self, owner: str, held: Collection[int] = ()) -> Trial | None:
        """The next waiting trial, or one whose worker has lost it; from now on ``owner``'s. None where there is none.

        ``held``: ids that ``owner`` already works on. One that is its own but not among them was claimed by a
        transaction whose answer got lost, and is returned.
        """

        def work(c: sa.Connection) -> Trial | None:
            found = next((row for row in self._owned(c, owner) if row.trial_id not in held), None)
            for query in (_WAITING, _LOST.format(ago=self._ago)):
                found = found or self._execute(c, query + self._lock("t", skip=True), lease=self.lease).first()
            if found is None:
                return None
            self._set(c, found.trial_id, owner=owner)
            self._execute(
                c,
                f"UPDATE trials SET state = 'RUNNING', datetime_start = {self._now} WHERE trial_id = :trial",
                trial=found.trial_id,
            )
            self._alive(c, found.trial_id)
            point = self._attribute(c, found.trial_id, "point")
            return Trial(found.trial_id, found.number, "RUNNING", point, owner=owner)

        return self.database.run(work)

    def renew(self, owner: str, progress: Mapping[int, dict[str, Any] | None]) -> set[int]:
        """A sign of life for the trials in ``progress``; returns those that are still ``owner``'s."""

        def work(c: sa.Connection) -> set[int]:
            mine = {row.trial_id for row in self._owned(c, owner)} & set(progress)
            for trial in sorted(mine):
                self._alive(c, trial)
                if progress[trial] is not None:
                    self._set(c, trial, progress=progress[trial])
            return mine

        return self.database.run(work)

    def finish(
        self, owner: str, trial: int, result: dict[str, Any], state: State = "COMPLETE", curve: Sequence[Any] = ()
    ) -> bool:
        """End a trial. False, and nothing changes, where it is not ``owner``'s any more: the result does not count."""

        def work(c: sa.Connection) -> bool:
            now = self._execute(
                c, "SELECT state FROM trials WHERE trial_id = :trial" + self._lock(), trial=trial
            ).scalar_one()
            owned = bool(self._attribute(c, trial, "owner") == owner)
            if now != "RUNNING" or not owned:
                return owned and now == state  # True: ended by an earlier try whose answer got lost
            self._set(c, trial, result=result, **({"curve": curve} if curve else {}))
            if state == "COMPLETE":  # a diverged run is infinitely bad, not missing
                loss = result["val_loss"]
                kind = "INF_POS" if loss is None else "FINITE"
                self._execute(
                    c,
                    f"INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (:trial, 0, :loss, '{kind}')",
                    trial=trial,
                    loss=loss,
                )
            ended = f"UPDATE trials SET state = '{state}', datetime_complete = {self._now} WHERE trial_id = :trial"
            self._execute(c, ended, trial=trial)
            return True

        return self.database.run(work)

    def release(self, owner: str, trial: int | None = None) -> None:
        """Give back what ``owner`` has, or one trial of it: it waits again."""

        def work(c: sa.Connection) -> None:
            for row in self._owned(c, owner):
                if trial in (None, row.trial_id):
                    self._execute(c, "UPDATE trials SET state = 'WAITING' WHERE trial_id = :trial", trial=row.trial_id)

        self.database.run(work)

    def all(self) -> list[Trial]:
        """Every trial by number; ended ones are read from the storage once."""

        def work(c: sa.Connection) -> list[Trial]:
            heads = self._execute(
                c,
                f"SELECT t.trial_id, t.number, CAST(t.state AS TEXT) AS state, {_QUIET[self.database.sqlite]} AS quiet"
                " FROM trials t LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id"
                " WHERE t.study_id = :study ORDER BY t.number",
            ).all()
            fresh = [row.trial_id for row in heads if row.trial_id not in self.ended]
            said: dict[int, dict[str, Any]] = {}
            for trial, key, value in self._attributes(c, fresh):
                said.setdefault(trial, {})[key] = json.loads(value)
            return [self.ended.get(row.trial_id) or _trial(row, said.get(row.trial_id, {})) for row in heads]

        found = [trial for trial in self.database.run(work, write=False) if trial.point]
        self.ended.update((trial.id, trial) for trial in found if trial.state not in OPEN)
        return found

    def curves(self) -> list[list[Any]]:
        """The curves of the completed trials that have one."""

        def work(c: sa.Connection) -> list[list[Any]]:
            rows = self._execute(
                c,
                "SELECT a.value_json FROM trial_user_attributes a JOIN trials t ON t.trial_id = a.trial_id"
                " WHERE t.study_id = :study AND t.state = 'COMPLETE' AND a.key = 'curve' ORDER BY t.trial_id",
            )
            return [json.loads(text) for (text,) in rows]

        return self.database.run(work, write=False)

    # ---- SQL --------------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> str:
        return _NOW[self.database.sqlite]

    @property
    def _ago(self) -> str:
        return _AGO[self.database.sqlite]

    def _lock(self, of: str = "", *, skip: bool = False) -> str:
        """Row locks; on SQLite the transaction holds the whole database."""
        if self.database.sqlite:
            return ""
        return " FOR UPDATE" + (f" OF {of}" if of else "") + (" SKIP LOCKED" if skip else "")

    def _execute(self, c: sa.Connection, query: str, **values: Any) -> sa.CursorResult[Any]:
        return c.execute(sa.text(query), {"study": self.study, **values})

    def _owned(self, c: sa.Connection, owner: str) -> Sequence[Any]:
        """The running trials of a worker, locked."""
        query = (
            "SELECT t.trial_id, t.number FROM trials t JOIN trial_user_attributes o ON o.trial_id = t.trial_id"
            " WHERE t.study_id = :study AND t.state = 'RUNNING' AND o.key = 'owner' AND o.value_json = :owner"
            " ORDER BY t.trial_id"
        )
        return self._execute(c, query + self._lock("t"), owner=json.dumps(owner)).all()

    def _attribute(self, c: sa.Connection, trial: int, key: str) -> Any:
        query = "SELECT value_json FROM trial_user_attributes WHERE trial_id = :trial AND key = :key"
        return json.loads(self._execute(c, query, trial=trial, key=key).scalar_one_or_none() or "null")

    def _attributes(self, c: sa.Connection, trials: Sequence[int]) -> Sequence[Any]:
        query = (
            "SELECT a.trial_id, a.key, a.value_json FROM trial_user_attributes a"
            " JOIN trials t ON t.trial_id = a.trial_id WHERE t.study_id = :study AND a.key <> 'curve'"
        )
        if len(trials) > 500:  # most of them: one pass is cheaper than a long list
            return self._execute(c, query).all()
        listed = sa.text(query + " AND a.trial_id IN :trials").bindparams(sa.bindparam("trials", expanding=True))
        return c.execute(listed, {"study": self.study, "trials": list(trials)}).all()

    def _set(self, c: sa.Connection, trial: int, **attributes: Any) -> None:
        for key, value in attributes.items():
            c.execute(sa.text(_ATTRIBUTE), {"trial": trial, "key": key, "value": json.dumps(value)})

    def _alive(self, c: sa.Connection, trial: int) -> None:
        self._execute(
            c,
            f"INSERT INTO trial_heartbeats (trial_id, heartbeat) VALUES (:trial, {self._now})"
            " ON CONFLICT (trial_id) DO UPDATE SET heartbeat = excluded.heartbeat",
            trial=trial,
        )

    def _agreed(self, c: sa.Connection, lease: float | None) -> str:
        """The study's lease as JSON, set where it is not yet."""
        self._execute(
            c,
            "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (:study, 'lease', :lease)"
            " ON CONFLICT (study_id, key) DO NOTHING",
            lease=json.dumps(lease or LEASE),
        )
        query = "SELECT value_json FROM study_user_attributes WHERE study_id = :study AND key = 'lease'"
        return str(self._execute(c, query).scalar_one())

    def _insert(self, c: sa.Connection, points: Sequence[Point]) -> None:
        """Waiting trials with their points; as parameters too, so that Optuna's tools and samplers read them."""
        from optuna.distributions import FloatDistribution, distribution_to_json

        first = self._execute(c, "SELECT count(*) FROM trials WHERE study_id = :study").scalar_one()
        c.execute(
            sa.text("INSERT INTO trials (number, study_id, state) VALUES (:number, :study, 'WAITING')"),
            [{"number": first + i, "study": self.study} for i in range(len(points))],
        )
        numbered = self._execute(
            c, "SELECT trial_id FROM trials WHERE study_id = :study AND number >= :first ORDER BY number", first=first
        )
        ids = [trial for (trial,) in numbered]
        c.execute(
            sa.text(_ATTRIBUTE),
            [{"trial": t, "key": "point", "value": json.dumps(p)} for t, p in zip(ids, points, strict=True)],
        )
        ranges = {k: [p[k] for p in points] for k in points[0]}
        kinds = {k: distribution_to_json(FloatDistribution(min(v), max(v))) for k, v in ranges.items()}
        c.execute(
            sa.text(
                "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) VALUES (:trial, :name, :value, :kind)"
            ),
            [
                {"trial": t, "name": k, "value": float(v), "kind": kinds[k]}
                for t, p in zip(ids, points, strict=True)
                for k, v in p.items()
            ],
        )


def _trial(row: Any, attributes: dict[str, Any]) -> Trial:
    return Trial(
        row.trial_id,
        row.number,
        row.state,
        attributes.get("point", {}),
        attributes.get("result"),
        attributes.get("owner"),
        attributes.get("progress"),
        None if row.quiet is None else float(row.quiet),
    )
