"""A sweep whose file changes under way, whose storage is lost, or whose results speak against it."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mue.cli import main
from mue.lab.data.spec import open_corpus
from mue.lab.runners.runner import Done, Message
from mue.lab.sweep import sweep as sweep_module
from mue.lab.sweep.report import sweep_report
from mue.lab.sweep.result import SweepResult
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import SweepSpec, sweep_from
from mue.lab.sweep.state import SweepState, join
from mue.lab.sweep.storage import Database
from mue.lab.sweep.sweep import run_sweep
from mue.lab.sweep.trial import Trial
from mue.lab.sweep.tuned import tuned_of
from mue.lab.sweep.worker import Worker
from mue.lab.train.run import Run
from mue.plan.toml import read_toml
from mue.util.files import digest, write_json
from support.scripted_runner import Heard, Scripted, done


@pytest.fixture
def spec(experiment: Path) -> SweepSpec:
    """Five learning rates, one cell."""
    found = sweep_from(read_toml(experiment), experiment.parent)
    return replace(found, grid=replace(found.grid, lr=lrs(5), weight_decay=(0.1,), init_std=(0.02,), seeds=(0,)))


def lrs(count: int) -> tuple[float, ...]:
    return tuple(2.0 ** (i - 9) for i in range(count))


def asking(spec: SweepSpec, count: int) -> SweepSpec:
    return replace(spec, grid=replace(spec.grid, lr=lrs(count)))


def ended(run: Run, least: float = 2.0) -> Done:
    """With its minimum at the third learning rate."""
    assert run.plan.tuned is not None
    return Done(run, {**done(run).result, "val_loss": least + 0.1 * (math.log2(run.plan.tuned.lr) + 7) ** 2})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rates that a runner trained, in order."""
    found: list[float] = []

    def script(runner: Scripted) -> list[Message]:
        messages: list[Message] = [ended(run) for run in runner.flying.values()]
        found.extend(m.run.plan.tuned.lr for m in messages if isinstance(m, Done) and m.run.plan.tuned)
        return messages

    monkeypatch.setattr(sweep_module, "open_runner", lambda *_, **__: Scripted(script))
    return found


class Interrupting(Heard):
    """Ends the worker after some trials."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
        super().ended(run, result, fresh=fresh)
        if len(self.counted) == self.after:
            raise KeyboardInterrupt


def run(
    spec: SweepSpec,
    out: Path,
    listener: Heard | None = None,
    *,
    resume: bool = False,
    storage: str | None = None,
    study: str | None = None,
) -> SweepResult:
    corpus = open_corpus(spec.source)
    return run_sweep(spec, out, corpus, listener=listener, resume=resume, storage=storage, study=study)


def test_points_that_are_no_longer_asked_for_are_not_trained(
    spec: SweepSpec, tmp_path: Path, trained: list[float]
) -> None:
    """Narrowed after an interrupt, and widened again: what waited is withdrawn, and comes back."""
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path, Interrupting(2))
    began, heard = set(trained), Heard()
    swept = run(asking(spec, 3), tmp_path, heard)
    assert set(trained) == began | set(lrs(3))
    assert any("not in the file any more" in words for words in heard.words)
    assert len(swept.best.points) == len(set(trained)), "what was trained counts, asked for or not"
    assert {t.point["lr"] for t in SweepState.load(tmp_path).read_trials().all()} == set(trained)
    swept = run(spec, tmp_path)
    assert sorted(trained) == sorted(lrs(5)) and len(swept.best.points) == 5  # each of them once


def test_a_grid_widened_beside_a_worker_is_what_counts(spec: SweepSpec, tmp_path: Path, trained: list[float]) -> None:
    """The worker that was there before ends with the wider grid, too."""
    narrow = asking(spec, 3)

    class Widening(Heard):
        def ended(self, run: Run, result: dict[str, Any], *, fresh: bool) -> None:
            if not self.counted:  # as another worker does at its start
                trials = SweepState(tmp_path, spec, spec.identity(corpus.hash), None).open_trials()
                about = {"identity": spec.identity(corpus.hash), "spec": spec.to_dict()}
                trials.ask(about, sampler_of(spec.grid).points(), only=True)
            super().ended(run, result, fresh=fresh)

    corpus = open_corpus(spec.source)
    swept = run(narrow, tmp_path, Widening())
    assert sorted(trained) == sorted(lrs(5))
    assert len(swept.best.points) == 5 and swept.spec.grid == spec.grid
    told = json.loads((tmp_path / "result.json").read_text())
    assert len(told["cells"][0]["points"]) == 5
    assert "so far" not in sweep_report(tmp_path).read_text()
    assert SweepState.load(tmp_path).spec == spec and tuned_of(tmp_path).notes == ()
    own = replace(narrow, grid=replace(narrow.grid, runner="stacked"))
    about = json.loads((tmp_path / "sweep.json").read_text())
    write_json(tmp_path / "sweep.json", {**about, "spec": own.to_dict()})  # a machine that was not told
    assert run(own, tmp_path, resume=True).spec.grid == replace(spec.grid, runner="stacked")
    assert run(narrow, tmp_path).spec.grid == narrow.grid  # the control: started with it, it is what is asked for


def test_a_grid_widened_as_a_worker_ends_is_worked_on(
    spec: SweepSpec, tmp_path: Path, trained: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its last look at the trials, before it writes the result."""
    corpus, asked = open_corpus(spec.source), [spec]

    class Late(Worker):
        def work(self) -> list[Trial]:
            ended = super().work()
            while asked:
                about = {"identity": spec.identity(corpus.hash), "spec": asked.pop().to_dict()}
                self.trials.ask(about, sampler_of(spec.grid).points(), only=True)
            return ended

    monkeypatch.setattr(sweep_module, "Worker", Late)
    swept = run(asking(spec, 3), tmp_path)
    assert sorted(trained) == sorted(lrs(5)) and len(swept.best.points) == 5


def test_a_report_of_a_new_grid_without_a_result(spec: SweepSpec, tmp_path: Path, trained: list[float]) -> None:
    run(asking(spec, 3), tmp_path)
    other = replace(spec, grid=replace(spec.grid, lr=(0.5, 1.0)))
    trials = SweepState.load(tmp_path).read_trials()
    trials.ask({"identity": {}, "spec": other.to_dict()}, sampler_of(other.grid).points(), only=True)
    assert "so far: tuned" in sweep_report(tmp_path).read_text()  # by the three runs that have ended
    trials.ask({"identity": {}, "spec": {**other.to_dict(), "grid": {"new": 1}}}, [], only=False)
    with pytest.raises(ValueError, match="another version of mue"):
        sweep_report(tmp_path)


@pytest.fixture
def shared(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'shared.db'}"


def test_another_grid_from_another_folder_is_refused_and_not_adopted(
    spec: SweepSpec, tmp_path: Path, trained: list[float], shared: str
) -> None:
    """Whichever of the two has ended; what was trained stays, and a folder that has had part in it may change it."""
    mine, theirs = spec, replace(spec, grid=replace(spec.grid, lr=(0.001, 0.5)))
    with pytest.raises(KeyboardInterrupt):
        run(mine, tmp_path / "mine", Interrupting(2), storage=shared)
    for _ in ("while mine is open", "after it has ended"):
        with pytest.raises(
            ValueError,
            match=r"holds another sweep of this base \(lr differ: lr is \[0.00195.* there, \[0.001, 0.5\] here\): .* --study NAME",
        ):
            run(theirs, tmp_path / "theirs", storage=shared)
        assert not (tmp_path / "theirs").exists() and 0.5 not in trained
        swept = run(mine, tmp_path / "mine", storage=shared)
        assert sorted(trained) == sorted(lrs(5)) and swept.spec.grid == mine.grid
    run(mine, tmp_path / "ours", storage=shared)  # the control: the same grid takes part
    wider = asking(spec, 6)
    assert run(wider, tmp_path / "ours", storage=shared).spec.grid == wider.grid, "and may change it from then on"


def test_sweeps_of_one_base_under_names_of_their_own(
    spec: SweepSpec, tmp_path: Path, trained: list[float], shared: str
) -> None:
    mine, theirs = spec, replace(spec, grid=replace(spec.grid, lr=(0.001, 0.5)))
    run(mine, tmp_path / "mine", storage=shared)
    for _ in ("first", "again, from what the folder says"):
        swept = run(theirs, tmp_path / "theirs", storage=shared, study="theirs" if _ == "first" else None)
        assert {t.point["lr"] for t in swept.trials} == {0.001, 0.5}
    assert len(run(mine, tmp_path / "mine").trials) == 5
    with pytest.raises(ValueError, match=r"the sweep of .*theirs is called theirs, not other: leave --study out"):
        run(theirs, tmp_path / "theirs", storage=shared, study="other")
    longer = replace(theirs, training=replace(theirs.training, steps=41))
    with pytest.raises(ValueError, match=r"theirs in .*shared.db is a sweep of another experiment \(training differ\)"):
        run(longer, tmp_path / "longer", storage=shared, study="theirs")
    with pytest.raises(ValueError, match=r"choose one of the sweeps in .* with --study:\n.*\n  theirs "):
        join(tmp_path / "seen", shared, None)
    join(tmp_path / "seen", shared, "theirs")
    assert "All 2 are in trials.csv" in sweep_report(tmp_path / "seen").read_text()
    assert replace(SweepState.load(tmp_path / "seen"), folder=tmp_path / "theirs") == SweepState.load(
        tmp_path / "theirs"
    )


def test_of_two_grids_at_once_one_is_refused(spec: SweepSpec, tmp_path: Path, shared: str) -> None:
    """Judged where the study is held, or both would find nothing there and the second would take the first's place."""
    corpus, gate, refused = open_corpus(spec.source), threading.Barrier(2), list[str]()
    Database(shared).study(digest(spec.identity(corpus.hash)))

    def start(count: int) -> None:
        state = SweepState.start(tmp_path / f"of {count}", asking(spec, count), corpus, shared)
        trials = state.open_trials()
        before = state.with_current_grid(trials)
        gate.wait()
        try:
            state.ask(trials, before)
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(count,)) for count in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1 and "lr differ" in refused[0]
    assert len(list(tmp_path.glob("of */sweep.json"))) == 1


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a{b}", "a b#c", "[a];b", "file:a&b=c", "%s {0}"])
def test_a_folder_may_have_any_name(spec: SweepSpec, tmp_path: Path, trained: list[float], name: str) -> None:
    """Its storage is in it, whatever a URL would make of the name; so is one that is named by --storage."""
    folder = tmp_path / name / "s"
    run(asking(spec, 2), folder)
    assert (folder / "optuna.db").exists() and sweep_report(folder).exists()
    run(asking(spec, 2), tmp_path / "second", storage=f"sqlite:///{tmp_path / name / 'shared.db'}")
    assert (tmp_path / name / "shared.db").exists()
    assert {p.name for p in tmp_path.iterdir()} >= {name, "second"}
    assert not [p for p in tmp_path.iterdir() if p.is_file() and p.name not in ("experiment.toml",)]


def test_a_damaged_storage_names_the_remedy(spec: SweepSpec, tmp_path: Path, trained: list[float]) -> None:
    run(spec, tmp_path)
    (tmp_path / "optuna.db").write_bytes(b"no database" * 1000)
    for act in (lambda: sweep_report(tmp_path), lambda: run(spec, tmp_path)):
        with pytest.raises(ValueError, match="remove the file and start the sweep again"):
            act()
    (tmp_path / "optuna.db").unlink()
    before = len(trained)
    assert len(run(spec, tmp_path).best.points) == 5 and len(trained) > before  # the runner here stores no results


def test_a_result_of_a_former_grid_says_so(spec: SweepSpec, tmp_path: Path, trained: list[float]) -> None:
    run(asking(spec, 4), tmp_path)
    assert tuned_of(tmp_path).notes == ()
    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path, Interrupting(1))
    assert "changed since" in " ".join(tuned_of(tmp_path).notes)


def test_a_report_writes_nothing_into_the_storage(
    spec: SweepSpec, tmp_path: Path, trained: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it can be read from a disk that is read-only; and it makes none where there is none."""
    run(spec, tmp_path)
    wrote: list[bool] = []
    ask = Database.run

    def watched(self: Database, work: Any, *, write: bool = True) -> Any:
        wrote.append(write)
        return ask(self, work, write=write)

    monkeypatch.setattr(Database, "run", watched)
    sweep_report(tmp_path)
    assert wrote and not any(wrote)
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "optuna.db").unlink()
    with pytest.raises(ValueError, match=r"no storage .*--resume"):
        sweep_report(tmp_path)
    assert not (tmp_path / "optuna.db").exists() and (tmp_path / "report.html").read_text() == page
    Database(f"sqlite:///{tmp_path / 'optuna.db'}")
    with pytest.raises(ValueError, match="holds nothing of this sweep"):
        sweep_report(tmp_path)


def test_what_speaks_against_a_result_is_said(spec: SweepSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run learned anything; and a sweep without a valley says that it has the lowest run."""
    for name, least in (("good", 2.0), ("bad", 6.0)):
        script = lambda runner, least=least: [ended(run, least) for run in runner.flying.values()]  # noqa: E731
        monkeypatch.setattr(sweep_module, "open_runner", lambda *_, s=script, **__: Scripted(s))
        swept = run(spec, tmp_path / name)
        said = sweep_report(tmp_path / name).read_text()
        assert swept.best.valley is not None and not any("far below" in words for words in swept.warnings)
        assert ("the loss of guessing" in said) == ("the loss of guessing" in " ".join(swept.warnings)) == (least > 5.6)
        other = replace(
            spec, settings=replace(spec.settings, task="order")
        )  # of four classes: the task says what guessing costs
        assert "below 1.39 nats per window, the loss of guessing" in " ".join(replace(swept, spec=other).warnings)
    assert swept.best.valley is not None
    far = replace(swept.best.valley, loss_at_minimum=1.0)
    assert "far below every run" in replace(swept, best=replace(swept.best, valley=far)).warnings[0]
    single = run(asking(spec, 1), tmp_path / "one")
    assert single.best.valley is not None and single.best.valley.edge is None
    assert "the lowest run's, with loss 6.4" in single.warnings[0]
    assert any("no valley was fitted" in note for note in tuned_of(tmp_path / "one").notes)


def test_the_terminal_says_what_speaks_against_it(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing does, it says nothing."""
    for least, speaks in ((2.0, False), (6.0, True)):
        script = lambda runner, least=least: [ended(run, least) for run in runner.flying.values()]  # noqa: E731
        monkeypatch.setattr(sweep_module, "open_runner", lambda *_, s=script, **__: Scripted(s))
        out = tmp_path / f"least {least} [b]"
        monkeypatch.setattr("sys.argv", ["mue", "sweep", str(experiment), "-o", str(out)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr().out
        assert not end.value.code and ("the loss of guessing" in said) == speaks
        assert f"report: {out}/report.html" in said  # whatever is in the name
        assert "try [sweep] betas" in said  # names of tables are no markup
