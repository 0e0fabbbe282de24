"""The trials of a sweep on SQLite and on PostgreSQL: one a point, one worker each, counted once, whatever breaks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mue.lab.sweep import storage
from mue.lab.sweep.storage import Database, StorageError, for_optuna
from mue.lab.sweep.trial import Trial, name_of
from mue.lab.sweep.trials import Trials
from support.postgres import Wire, postgres

POINTS = [{"lr": 2.0**-e, "weight_decay": 0.1, "init_std": 0.05, "seed": s} for e in range(5, 9) for s in (0, 1)]
RESULT = {"key": "0123456789abcdef", "status": "finished", "val_loss": 2.5}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'trials.db'}"
    return str(request.getfixturevalue("server"))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A study of the test's own: the tests share one server."""
    return str(request.node.name)


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """``work(i)`` in ``count`` threads that start together."""
    gate, out = threading.Barrier(count), [None] * count

    def one(i: int) -> None:
        gate.wait()
        out[i] = work(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_a_point_has_one_trial_however_many_workers_make_and_add_it(url: str, name: str) -> None:
    added = at_once(4, lambda i: Trials(Database(url), name).add(POINTS[i:] + POINTS[:i]))
    assert sum(added) == len(POINTS)
    found = Trials(Database(url), name).all()
    assert sorted(name_of(t.point) for t in found) == sorted(map(name_of, POINTS))
    assert [t.number for t in found] == list(range(len(POINTS)))


def test_a_limit_holds_for_all_workers_together(url: str, name: str) -> None:
    assert sum(at_once(3, lambda i: Trials(Database(url), name).add(POINTS[2 * i : 2 * i + 2], limit=5))) == 5


def test_what_waits_is_withdrawn_and_added_again(url: str, name: str) -> None:
    """One under way stays, whoever is faster; a withdrawn one is whole for Optuna, and in nobody's way."""
    import optuna

    trials = Trials(Database(url), name)
    assert trials.add(POINTS[:5]) == 5
    keep = trials.all()[0]
    ask = partial(trials.ask, {"spec": 1}, only=True)

    def claim() -> Trial:
        while not (claimed := Trials(Database(url), name).claim("a")):
            pass  # the other locks every row for a moment
        return claimed

    gone, claimed = at_once(2, lambda i: claim() if i else ask([keep.point]))
    left = trials.all()
    assert {t.id for t in left} == {keep.id, claimed.id} and gone == 4 and trials.described() == {"spec": 1}
    study = optuna.load_study(study_name=name, storage=for_optuna(url))
    assert Counter(t.state.name for t in study.trials)["FAIL"] == 5 - len(left)
    for t in study.trials:
        t._validate()
    reader = Trials(Database(url), name)  # has seen it while it was withdrawn
    assert len(reader.all()) == len(left)
    assert trials.add(POINTS, limit=4) == 4 - len(left) and len(reader.all()) == 4
    assert trials.add(POINTS) == len(POINTS) - 4 and len({t.name for t in reader.all()}) == len(POINTS)
    for trial in reader.all():
        trials.claim(f"worker {trial.id}")
    assert len(reader.all()) == len(POINTS)


@pytest.mark.parametrize("end", ["released", "lapsed", "asked for again", "finished"])
def test_what_is_under_way_and_not_asked_for_any_more_is_not_begun_again(url: str, name: str, end: str) -> None:
    trials = Trials(Database(url), name, lease=0.2 if end == "lapsed" else 60.0)
    trials.add(POINTS[:3])
    mine = trials.claim("a")
    assert mine is not None
    rest = [t.point for t in trials.all() if t.id != mine.id]
    assert trials.ask({}, rest, only=True) == 1 and len(trials.all()) == 3
    if end == "asked for again":
        trials.ask({}, POINTS[:3], only=True)
    if end in ("released", "asked for again"):
        trials.release("a")
    if end == "lapsed":
        time.sleep(0.4)
    if end == "finished":
        assert trials.finish("a", mine.id, RESULT)
    others = [trials.claim(f"b{i}") for i in range(4)]
    assert (mine.id in {t.id for t in others if t}) == (end == "asked for again")
    assert (mine.id in {t.id for t in trials.all()}) == (end in ("asked for again", "finished"))


def test_what_the_driver_refuses_is_a_storage_error(url: str) -> None:
    """A full disk, a disk that is read-only, a file that is no database any more: all end like this."""
    with pytest.raises(StorageError, match=r"the storage .* failed: .*nowhere"):
        Database(url).run(lambda execute: execute("SELECT 1 FROM nowhere"))


def test_each_trial_is_claimed_once(url: str, name: str) -> None:
    Trials(Database(url), name).add(POINTS)

    def claim_all(i: int) -> list[int]:
        trials, held = Trials(Database(url), name), list[int]()
        while trial := trials.claim(f"worker {i}", held):
            held.append(trial.id)
        return held

    claimed = Counter(trial for held in at_once(4, claim_all) for trial in held)
    assert len(claimed) == len(POINTS) and set(claimed.values()) == {1}


def test_control_without_transactions_two_workers_win_one_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, gate = f"sqlite:///{tmp_path / 'trials.db'}", threading.Barrier(2)
    Trials(Database(url), "x").add(POINTS)
    databases = [Database(url), Database(url)]

    def unguarded(database: Database, work: Callable[[storage.Execute], Any]) -> Any:
        inner = storage._sqlite_execute(database._connect())

        def execute(query: str, *many: Any, **values: Any) -> storage.Rows:
            rows = inner(query, *many, **values)
            if "'WAITING'" in query:
                gate.wait()  # both have read before either writes
            return rows

        return work(execute)

    def claim(i: int) -> int:
        trials = Trials(databases[i], "x")
        monkeypatch.setattr(databases[i], "run", lambda work: unguarded(databases[i], work))
        trial = trials.claim(f"worker {i}")
        assert trial is not None
        return trial.id

    assert len(set(at_once(2, claim))) == 1


def age(trials: Trials, seconds: int) -> None:
    """Let so many seconds pass since every sign of life: no test waits for a clock."""
    earlier = f"heartbeat - interval '{seconds} seconds'"
    if trials.database.sqlite:
        earlier = f"strftime('%Y-%m-%d %H:%M:%f000', heartbeat, '-{seconds} seconds')"
    trials.database.run(lambda execute: execute(f"UPDATE trial_heartbeats SET heartbeat = {earlier}"))


def test_a_silent_worker_loses_its_trial_and_is_not_heard_again(url: str, name: str) -> None:
    trials = Trials(Database(url), name, lease=1000.0)
    trials.add(POINTS[:1])
    trial = trials.claim("slow")
    assert trial is not None
    age(trials, 600)
    assert trials.renew("slow", {trial.id: {"step": 7}}) == {trial.id}
    age(trials, 600)
    assert trials.claim("quick") is None, "a sign of life must renew the lease"
    age(trials, 600)
    assert (taken := trials.claim("quick")) is not None and taken.id == trial.id
    assert trials.renew("slow", {trial.id: None}) == set()
    assert not trials.finish("slow", trial.id, {**RESULT, "val_loss": 9.0})
    assert trials.finish("quick", trial.id, RESULT)
    assert not trials.finish("slow", trial.id, {**RESULT, "val_loss": 9.0})
    (ended,) = trials.all()
    assert (ended.state, ended.owner, ended.loss, ended.progress) == ("COMPLETE", "quick", 2.5, {"step": 7})


def test_a_worker_back_from_a_long_sleep_does_not_claim_what_it_still_holds(url: str, name: str) -> None:
    trials = Trials(Database(url), name, lease=1000.0)
    trials.add(POINTS[:1])
    trial = trials.claim("a")
    assert trial is not None
    age(trials, 2000)
    assert trials.claim("a", {trial.id}) is None
    assert trials.claim("b") is None, "asking for more is a sign of life"
    assert (again := trials.claim("a")) is not None and again.id == trial.id, "its answer had got lost"


def test_what_is_given_back_waits_again(url: str, name: str) -> None:
    trials = Trials(Database(url), name)
    trials.add(POINTS[:2])
    first, second = trials.claim("a"), trials.claim("b")
    assert first and second and trials.claim("c") is None
    trials.release("a")
    assert (again := trials.claim("c")) is not None and again.id == first.id
    assert trials.claim("d") is None, "only a's was given back"


def test_what_was_just_claimed_is_not_given_back_with_its_last_owners(
    server: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL: who gives back waits for the claim's lock, and must then judge anew whose the trial is."""
    claiming, giving, go = (
        Trials(Database(server), name, lease=1000.0),
        Trials(Database(server), name),
        threading.Event(),
    )
    claiming.add(POINTS[:1])
    claiming.claim("dead")
    age(claiming, 2000)
    alive = claiming._alive
    monkeypatch.setattr(claiming, "_alive", lambda *a: (alive(*a), go.wait(60)))  # in the middle of the transaction

    def blocked() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        return Database(server).run(lambda execute: execute(query), write=False) != [(0,)]

    def work(i: int) -> Any:
        if i == 0:
            return claiming.claim("new")
        if i == 1:
            time.sleep(0.2)
            return giving.release("dead")
        deadline = time.monotonic() + 30
        while not blocked() and time.monotonic() < deadline:
            time.sleep(0.02)
        go.set()
        return None

    assert at_once(3, work)[0] is not None
    (trial,) = giving.all()
    assert (trial.state, trial.owner) == ("RUNNING", "new")


def test_a_lost_answer_changes_nothing(url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each transaction is committed, and then run again as after a connection that dropped on the way back."""
    database = Database(url)
    once = database.run
    monkeypatch.setattr(database, "run", lambda work, **how: (once(work, **how), once(work, **how))[1])
    trials = Trials(database, name)
    trials.add(POINTS[:3])
    trial = trials.claim("a")
    assert trial is not None
    assert [t.state for t in trials.all()] == ["RUNNING", "WAITING", "WAITING"]
    assert trials.renew("a", {trial.id: None}) == {trial.id}
    assert trials.finish("a", trial.id, RESULT)
    trials.release("a")
    assert [t.state for t in trials.all()] == ["COMPLETE", "WAITING", "WAITING"]


def test_workers_agree_on_the_lease(url: str, name: str) -> None:
    assert Trials(Database(url), name, lease=7.0).lease == 7.0
    assert Trials(Database(url), name).lease == 7.0
    with pytest.raises(ValueError, match="lease of 7 s, not 9"):
        Trials(Database(url), name, lease=9.0)


def test_optuna_reads_what_we_wrote(url: str, name: str) -> None:
    import optuna

    trials = Trials(Database(url), name)
    trials.add(POINTS[:3])
    for loss in (2.5, None):
        trial = trials.claim("a")
        assert trial is not None
        trials.finish("a", trial.id, {**RESULT, "val_loss": loss})
    study = optuna.load_study(study_name=name, storage=for_optuna(url))
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "WAITING"]
    assert [t.value for t in study.trials] == [2.5, float("inf"), None]
    assert study.best_params == POINTS[0]


def test_a_cut_wire_is_waited_out(server: str, name: str) -> None:
    wire = Wire(server)
    told: list[str] = []
    trials = Trials(Database(wire.url, trouble=lambda what, seconds: told.append(what)), name)
    trials.add(POINTS[:1])
    wire.cut()
    threading.Timer(1.0, wire.mend).start()
    started = time.monotonic()
    assert trials.claim("a") is not None
    assert time.monotonic() - started > 0.9 and len(told) == 1
    wire.cut()
    impatient = trials.database
    impatient.patience = 0.5
    with pytest.raises(StorageError, match="cannot be reached"):
        trials.claim("a")
    wire.close()


def test_a_worker_frozen_in_a_transaction_goes_on(server: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends a transaction that stands still, so that nobody waits for its locks; it is then begun again."""
    monkeypatch.setitem(storage._POSTGRES, "options", "-c idle_in_transaction_session_timeout=100")
    naps = [0.5, 0.0]

    def work(execute: storage.Execute) -> Any:
        execute("SELECT 1")
        time.sleep(naps.pop(0))
        return execute("SELECT 2")

    assert Database(server).run(work) == [(2,)] and naps == []


def test_storages_that_cannot_be_opened(tmp_path: Path, server: str) -> None:
    for bad, words in {
        "no url": "not 'no url'",
        "mysql://me@db/x": "not 'mysql'",
        "sqlite://": "sqlite:///FILE",
        server.replace("/postgres", "/nowhere"): "nowhere",
        server.replace("mue:", "mue:wrong"): "password",
    }.items():
        with pytest.raises(ValueError, match=words) as caught:
            Database(bad)
        assert "wrong" not in str(caught.value), "a password is never shown"
    (tmp_path / "not.db").write_text("this is no database, and longer than a header of sixteen bytes")
    with pytest.raises(ValueError, match=r"not\.db"):
        Trials(Database(f"sqlite:///{tmp_path / 'not.db'}"), "x")
