"""The trials of one sweep: one for each point, claimed by one worker at a time, counted once.

A trial waits, is claimed (RUNNING, with its worker's name and a sign of life), and ends. A worker that gives no sign of life
for a *lease* has lost its trial: whoever asks next takes it over, and what the first says of it later is refused. All
times are the storage's own clock; each method is one transaction, safe to repeat.

A point (learning rate, weight decay, ..., seed) has one trial however many workers add it, and however often.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mue.lab.sweep.storage import Database, Execute, MissingError, Rows
from mue.lab.sweep.trial import OPEN, About, Check, Point, State, Trial, name_of
from mue.lab.valley.pruning import Curve

LEASE = 60.0  # seconds; a worker gives a sign of life at least four times in it (mue.lab.sweep.heartbeat)

# Times are UTC to the microsecond without a zone, as SQLAlchemy reads them back. SQLite's %f has milliseconds, hence the
# zeros. PostgreSQL's now() would be the transaction's begin, which is past for one that waited for a lock.
_NOW = {True: "strftime('%Y-%m-%d %H:%M:%f000', 'now')", False: "timezone('utc', clock_timestamp())"}
_AGO = {
    True: "strftime('%Y-%m-%d %H:%M:%f000', 'now', '-' || :lease || ' seconds')",
    False: "timezone('utc', clock_timestamp()) - make_interval(secs => :lease)",
}
_QUIET = {
    True: "(julianday('now') - julianday(h.heartbeat)) * 86400",
    False: "extract(epoch from timezone('utc', clock_timestamp()) - h.heartbeat)",
}
# What somebody enqueued with Optuna has no point of ours, and is not ours to train.
_WAITING = (
    "SELECT t.trial_id, t.number FROM trials t WHERE t.study_id = :study AND t.state = 'WAITING' AND EXISTS"
    " (SELECT 1 FROM trial_user_attributes p WHERE p.trial_id = t.trial_id AND p.key = 'point') ORDER BY t.trial_id LIMIT 1"
)
_LOST = (
    "SELECT t.trial_id, t.number FROM trials t JOIN trial_heartbeats h ON h.trial_id = t.trial_id"
    " WHERE t.study_id = :study AND t.state = 'RUNNING' AND h.heartbeat < {ago} ORDER BY t.trial_id LIMIT 1"
)
_GET = "SELECT value_json FROM trial_user_attributes WHERE trial_id = :trial AND key = :key"
_SET = (
    "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (:trial, :key, :value)"
    " ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json"
)


class Trials:
    """The trials of the study ``name`` in ``database``.

    Args:
        lease: seconds without a sign of life after which a worker has lost its trial; the first worker of a sweep says it, the
            others find it (None).
        make: make the study where there is none; else nothing is written before it is asked for.

    Raises:
        ValueError: a lease that differs; no such study to read.
    """

    def __init__(self, database: Database, name: str, lease: float | None = None, *, make: bool = True) -> None:
        study = database.study(name) if make else database.find(name)
        if study is None:
            raise MissingError(f"the storage {database.name} holds nothing of this sweep")
        self.database, self.study = database, study
        self.ended: dict[int, Trial] = {}
        self._curves: dict[int, Curve] = {}
        self._now, self._ago = _NOW[database.sqlite], _AGO[database.sqlite]
        times = f"datetime_start = {self._now}, datetime_complete = {self._now}"  # Optuna expects both of what ended
        self._failed = f"UPDATE trials SET state = 'FAIL', {times} WHERE trial_id = :trial"
        stored = database.run(lambda execute: self._attribute(execute, "lease"), write=False)
        if stored is None and make:
            stored = database.run(lambda execute: self._agreed(execute, lease))
        stored = LEASE if stored is None else stored
        if lease is not None and lease != stored:
            raise ValueError(f"this sweep's first worker set a lease of {stored:g} s, not {lease:g}: leave --lease out")
        self.lease = stored

    def ask(self, about: About, points: Sequence[Point], *, only: bool, check: Check = lambda was: None) -> int:
        """From now on these points are asked for, and ``about`` is what this study is a sweep of: said to machines that know
        no more than the storage (:meth:`Database.studies`).

        All in one transaction. As three, a worker that was there before could take what had just been withdrawn
        (docs/LOG.md, "A sweep's layouts once more").

        Args:
            about: JSON-ready. points: in the order they are to be started. check: of what it was a sweep of until now.
            only: whatever else waits is withdrawn, and what is under way is not begun again if its worker loses it:
                nobody claims it until it is added again.

        Returns:
            How many were withdrawn.
        """

        def work(execute: Execute) -> int:
            self._hold(execute)
            check(self._attribute(execute, "sweep"))
            execute(
                "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (:study, 'sweep', :value)"
                " ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json",
                study=self.study,
                value=json.dumps(about),
            )
            gone = self._withdraw(execute, {name_of(point) for point in points}) if only else 0
            self._add(execute, points, None)
            return gone

        return self.database.run(work)

    def described(self) -> dict[str, Any] | None:
        """What was last said by :meth:`ask`, on whatever machine."""
        found: dict[str, Any] | None = self.database.run(lambda execute: self._attribute(execute, "sweep"), write=False)
        return found

    def add(self, points: Sequence[Point], *, limit: int | None = None) -> int:
        """Add one waiting trial for each point that has none or a withdrawn one.

        Args:
            limit: of the trials in all, those that were withdrawn not counted; None: no limit.

        Returns:
            How many were added; 0 also where another worker has added them.
        """

        def work(execute: Execute) -> int:
            self._hold(execute)
            return self._add(execute, points, limit)

        return self.database.run(work)

    def claim(self, owner: str, held: Collection[int] = ()) -> Trial | None:
        """The next waiting trial, or one whose worker has lost it; from now on ``owner``'s.

        Args:
            owner: the worker's name. held: ids that it already works on. One that is its own but not among them was
                claimed by a transaction whose answer got lost, and is returned.

        Returns:
            The trial; None where there is none to be had.
        """

        def work(execute: Execute) -> Trial | None:
            own = self._owned(execute, owner)
            for trial in [trial for trial, _ in own if trial in held]:
                self._alive(execute, trial)  # else a worker back from a long sleep could claim what it still holds
            found = [row for row in own if row[0] not in held]
            for query in (_WAITING, _LOST.format(ago=self._ago)):
                while not found:
                    rows = execute(query + self._lock(skip=True), study=self.study, lease=self.lease)
                    found = [row for row in rows if not self._unasked(execute, row[0])]
                    if not rows:
                        break
            if not found:
                return None
            trial, number = found[0]
            execute(_SET, trial=trial, key="owner", value=json.dumps(owner))
            execute(
                f"UPDATE trials SET state = 'RUNNING', datetime_start = {self._now} WHERE trial_id = :trial",
                trial=trial,
            )
            self._alive(execute, trial)
            ((point,),) = execute(_GET, trial=trial, key="point")
            return Trial(trial, number, "RUNNING", json.loads(point), owner=owner)

        return self.database.run(work)

    def renew(self, owner: str, progress: Mapping[int, dict[str, Any] | None]) -> set[int]:
        """Give a sign of life for trials.

        Args:
            progress: by their ids, what the worker last knows of each (step and loss), for people; None: nothing new.

        Returns:
            Those that are still ``owner``'s; the others have another worker by now.
        """

        def work(execute: Execute) -> set[int]:
            mine = {trial for trial, _ in self._owned(execute, owner)} & set(progress)
            for trial in sorted(mine):  # all workers in one order of ids, or they might wait for each other's rows
                self._alive(execute, trial)
                if progress[trial] is not None:
                    execute(_SET, trial=trial, key="progress", value=json.dumps(progress[trial]))
            return mine

        return self.database.run(work)

    def finish(
        self, owner: str, trial: int, result: dict[str, Any], state: State = "COMPLETE", curve: Sequence[Any] = ()
    ) -> bool:
        """End a trial.

        Args:
            result: what the run's ``result.json`` holds. state: how it ended, in Optuna's words. curve: its training
                losses as (step, loss), for judging others (``mue.lab.valley.pruning``).

        Returns:
            False, and nothing changes, where it is not ``owner``'s any more: the result does not count.
        """

        def work(execute: Execute) -> bool:
            ((now,),) = execute("SELECT state FROM trials WHERE trial_id = :trial" + self._lock(), trial=trial)
            owned = execute(_GET, trial=trial, key="owner") == [(json.dumps(owner),)]
            if now != "RUNNING" or not owned:
                return owned and bool(now == state)  # True: ended by an earlier try whose answer got lost
            execute(_SET, trial=trial, key="result", value=json.dumps(result))
            if curve:
                execute(_SET, trial=trial, key="curve", value=json.dumps(curve))
            if state == "COMPLETE":  # a diverged run is infinitely bad, not missing; Optuna keeps infinity as a type
                loss = result["val_loss"]
                kind = "INF_POS" if loss is None else "FINITE"
                execute(
                    "INSERT INTO trial_values (trial_id, objective, value, value_type)"
                    f" VALUES (:trial, 0, :loss, '{kind}')",
                    trial=trial,
                    loss=loss,
                )
            execute(
                f"UPDATE trials SET state = '{state}', datetime_complete = {self._now} WHERE trial_id = :trial",
                trial=trial,
            )
            return True

        return self.database.run(work)

    def release(self, owner: str) -> None:
        """Give back what ``owner`` has: it waits again."""

        def work(execute: Execute) -> None:
            for trial, _ in self._owned(execute, owner):
                execute("UPDATE trials SET state = 'WAITING' WHERE trial_id = :trial", trial=trial)

        self.database.run(work)

    def all(self) -> list[Trial]:
        """Every trial by number but those withdrawn; ended ones are read from the storage once.

        Nothing of an ended trial changes any more, and a worker looks at all of them every few seconds.
        """

        def work(execute: Execute) -> tuple[Rows, Rows]:
            heads = execute(
                f"SELECT t.trial_id, t.number, CAST(t.state AS TEXT), {_QUIET[self.database.sqlite]}"
                " FROM trials t LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id"
                " WHERE t.study_id = :study AND t.state <> 'FAIL' ORDER BY t.number",
                study=self.study,
            )
            new = [row[0] for row in heads if row[0] not in self.ended]
            return heads, self._attributes(execute, new, "<> 'curve'")  # those are long

        heads, rows = self.database.run(work, write=False)
        attributes: dict[int, dict[str, Any]] = {}
        # As one list: there are tens of thousands, and a listing of 10,000 trials is to take less than a second in all
        # (docs/results/trials.json).
        values = json.loads(f"[{','.join([text for _, _, text in rows])}]")
        for (trial, key, _), value in zip(rows, values, strict=True):
            attributes.setdefault(trial, {})[key] = value
        fresh = {
            row[0]: Trial.from_rows(attributes[row[0]], *row) for row in heads if "point" in attributes.get(row[0], ())
        }
        self.ended.update((trial.id, trial) for trial in fresh.values() if trial.state not in OPEN)
        found = [self.ended.get(row[0]) or fresh.get(row[0]) for row in heads]
        return [trial for trial in found if trial]  # what others put into the study by other means is not ours

    def curves(self, trials: Sequence[Trial]) -> dict[int, Curve]:
        """The training curves of those of the trials that ended and have one; each is read from the storage once.

        Returns:
            By the trials' ids, (step, loss) in order.
        """
        done = [trial.id for trial in trials if trial.state in ("COMPLETE", "PRUNED")]
        new = [trial for trial in done if trial not in self._curves]
        rows = (
            self.database.run(lambda execute: self._attributes(execute, new, "= 'curve'"), write=False) if new else []
        )
        self._curves.update(dict.fromkeys(new, ()) | {trial: json.loads(text) for trial, _, text in rows})
        return {trial: self._curves[trial] for trial in done if self._curves[trial]}

    # ---- SQL --------------------------------------------------------------------------------------------------------

    def _lock(self, *, skip: bool = False) -> str:
        """Locks on every row that a query joins: what it waited for is judged anew. SQLite's transaction holds the whole file."""
        return "" if self.database.sqlite else " FOR UPDATE" + (" SKIP LOCKED" if skip else "")

    def _hold(self, execute: Execute) -> None:
        """Nobody else adds or withdraws while this transaction lasts."""
        execute("SELECT study_id FROM studies WHERE study_id = :study" + self._lock(), study=self.study)

    def _add(self, execute: Execute, points: Sequence[Point], limit: int | None) -> int:
        """:meth:`add` inside a transaction that holds the study. A withdrawn trial waits again: no point has two."""
        rows = execute(
            "SELECT a.value_json, t.trial_id, CAST(t.state AS TEXT) FROM trials t"
            " JOIN trial_user_attributes a ON a.trial_id = t.trial_id WHERE t.study_id = :study AND a.key = 'point'",
            study=self.study,
        )
        known = {name_of(json.loads(text)): (trial, state) for text, trial, state in rows}
        withdrawn = {name: trial for name, (trial, state) in known.items() if state == "FAIL"}
        new = {name: p for p in points if (name := name_of(p)) not in known or name in withdrawn}  # by name: none twice
        room = None if limit is None else max(0, limit - len(known) + len(withdrawn))
        kept = list(new.items())[:room]
        if again := [{"trial": withdrawn[name]} for name, _ in kept if name in withdrawn]:
            execute("UPDATE trials SET state = 'WAITING', datetime_complete = NULL WHERE trial_id = :trial", again)
        if fresh := [point for name, point in kept if name not in withdrawn]:
            self._insert(execute, fresh)
        return len(kept)

    def _withdraw(self, execute: Execute, keep: Collection[str]) -> int:
        """Waiting trials but those of these names end as failed, running ones are marked; how many."""
        rows = execute(
            "SELECT t.trial_id, CAST(t.state AS TEXT), a.value_json FROM trials t"
            " JOIN trial_user_attributes a ON a.trial_id = t.trial_id WHERE t.study_id = :study AND a.key = 'point'"
            " AND t.state IN ('WAITING', 'RUNNING') ORDER BY t.trial_id" + self._lock(),
            study=self.study,
        )
        dropped = [(trial, state) for trial, state, text in rows if name_of(json.loads(text)) not in keep]
        execute(
            "DELETE FROM trial_user_attributes WHERE key = 'unasked'"
            " AND trial_id IN (SELECT trial_id FROM trials WHERE study_id = :study)",
            study=self.study,
        )
        running = [{"trial": t, "key": "unasked", "value": "true"} for t, state in dropped if state == "RUNNING"]
        execute(_SET, running)
        execute(self._failed, [{"trial": trial} for trial, state in dropped if state == "WAITING"])
        return len(dropped)

    def _unasked(self, execute: Execute, trial: int) -> bool:
        """Whether nobody asks for this trial any more; it then ends as failed."""
        if not execute(_GET, trial=trial, key="unasked"):
            return False
        execute("DELETE FROM trial_user_attributes WHERE trial_id = :trial AND key = 'unasked'", trial=trial)
        execute(self._failed, trial=trial)
        return True

    def _owned(self, execute: Execute, owner: str) -> Rows:
        """(id, number) of a worker's running trials, locked."""
        query = (
            "SELECT t.trial_id, t.number FROM trials t JOIN trial_user_attributes o ON o.trial_id = t.trial_id"
            " WHERE t.study_id = :study AND t.state = 'RUNNING' AND o.key = 'owner' AND o.value_json = :owner"
            " ORDER BY t.trial_id"
        )
        return execute(query + self._lock(), study=self.study, owner=json.dumps(owner))

    def _attributes(self, execute: Execute, trials: Sequence[int], key: str) -> Rows:
        """(id, key, JSON) of what is known of trials; ``key``: a condition on the keys."""
        query = (
            "SELECT a.trial_id, a.key, a.value_json FROM trial_user_attributes a"
            f" JOIN trials t ON t.trial_id = a.trial_id AND a.key {key} WHERE t.study_id = :study"
        )
        if len(trials) <= 500:  # else most of them: one pass is cheaper than a long list
            query += f" AND a.trial_id IN ({', '.join(map(str, [*trials, 0]))})"
        return execute(query, study=self.study)

    def _alive(self, execute: Execute, trial: int) -> None:
        """A sign of life, in the table where Optuna keeps its own."""
        execute(
            f"INSERT INTO trial_heartbeats (trial_id, heartbeat) VALUES (:trial, {self._now})"
            " ON CONFLICT (trial_id) DO UPDATE SET heartbeat = excluded.heartbeat",
            trial=trial,
        )

    def _attribute(self, execute: Execute, key: str) -> Any:
        """What the study itself says under ``key``; None where it says nothing."""
        query = "SELECT value_json FROM study_user_attributes WHERE study_id = :study AND key = :key"
        found = execute(query, study=self.study, key=key)
        return json.loads(found[0][0]) if found else None

    def _agreed(self, execute: Execute, lease: float | None) -> float:
        """The study's lease, set where it is not yet.

        Workers must agree on it: one with a shorter lease would take trials over whose owners have time left.
        """
        execute(
            "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (:study, 'lease', :lease)"
            " ON CONFLICT (study_id, key) DO NOTHING",
            study=self.study,
            lease=json.dumps(lease or LEASE),
        )
        return float(self._attribute(execute, "lease"))

    def _insert(self, execute: Execute, points: Sequence[Point]) -> None:
        """Waiting trials with their points; as parameters too, so that Optuna's tools and samplers read them."""
        from optuna.distributions import FloatDistribution, distribution_to_json

        # Optuna's trials are numbered without gaps; whoever calls holds the study, so nobody else adds meanwhile.
        ((first,),) = execute("SELECT count(*) FROM trials WHERE study_id = :study", study=self.study)
        execute(
            "INSERT INTO trials (number, study_id, state) VALUES (:number, :study, 'WAITING')",
            [{"number": first + i, "study": self.study} for i in range(len(points))],
        )
        numbered = "SELECT trial_id FROM trials WHERE study_id = :study AND number >= :first ORDER BY number"
        placed = [(t, p) for (t,), p in zip(execute(numbered, study=self.study, first=first), points, strict=True)]
        execute(_SET, [{"trial": t, "key": "point", "value": json.dumps(p)} for t, p in placed])
        # A distribution is what Optuna's plots scale an axis by; ours are points, so it spans those that are added.
        ranges = {k: [p[k] for p in points] for k in points[0]}
        kinds = {k: distribution_to_json(FloatDistribution(min(v), max(v), log=min(v) > 0)) for k, v in ranges.items()}
        execute(
            "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)"
            " VALUES (:trial, :name, :value, :kind)",
            [{"trial": t, "name": k, "value": float(v), "kind": kinds[k]} for t, p in placed for k, v in p.items()],
        )
