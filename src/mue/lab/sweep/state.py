"""The state of a sweep: each fact of it has one home, and is read and written here.

sweep.json in a machine's folder    which sweep the folder belongs to: its identity, its file as this machine knows it, and
                                    the storage, which is named nowhere else
the storage (``trials``)            the trials and their lease; and the file of whoever started last, on whatever machine,
                                    whose grid is what is asked for
result.json in the folder           what was fitted when the sweep ended here (``result``)
runs/ in the folder                 the runs that this machine trained (``mue.lab.train.run.Store``)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mue.lab.data import Data
from mue.lab.data.spec import describe_data
from mue.lab.sweep.result import SweepResult
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import SweepSpec
from mue.lab.sweep.storage import Database, MissingError, Trouble, without_password
from mue.lab.sweep.trials import Trials
from mue.lab.train.task import task_of
from mue.shapes import shape_from_dict
from mue.util.files import digest, write_json

SWEEP_FILE, RESULT_FILE = "sweep.json", "result.json"


@dataclass(frozen=True)
class SweepState:
    """A sweep as one machine's folder has it.

    Attributes:
        folder: this machine's. spec: the sweep as it was asked for here (:meth:`with_current_grid`: anywhere).
        identity: what must not change under it (:meth:`SweepSpec.identity`).
        storage: the URL of the storage it shares with others; None for a file in the folder.
        study: its name in the storage, where it was given one; None: it is named by its identity.
    """

    folder: Path
    spec: SweepSpec
    identity: dict[str, Any]
    storage: str | None
    study: str | None = None

    @classmethod
    def load(cls, folder: Path) -> SweepState:
        """The sweep in a folder.

        Raises:
            ValueError: there is none, or its file is damaged; the text says how to start one.
        """
        path = folder / SWEEP_FILE
        again = f"start it with mue sweep FILE --out {folder}"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            spec = SweepSpec.from_dict(stored["spec"])
            return cls(folder, spec, stored["identity"], stored["storage"], stored.get("study"))
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no sweep (no {SWEEP_FILE}): {again}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a whole sweep's ({type(error).__name__}: {error}): {again}") from error

    @classmethod
    def start(
        cls, folder: Path, spec: SweepSpec, corpus: Data, storage: str | None, study: str | None = None
    ) -> SweepState:
        """The sweep of ``spec`` in its folder, new or gone on with. Nothing is written.

        Args:
            storage, study: of a new sweep; one that is there knows its own.

        Raises:
            ValueError: the folder belongs to another experiment, storage or study; the data is too short for a new one.
        """
        path, own = folder / SWEEP_FILE, spec.identity(corpus.hash)
        if not path.exists():
            run = spec.first_run(describe_data(spec.source, corpus))
            task_of(spec.settings).batches_of(run, corpus)  # before the folder is made
            return cls(folder, spec, own, storage, study)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            before, kept, called = stored["identity"], stored.get("storage"), stored.get("study")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): choose another folder with --out, or remove it") from error
        if wrong := _differing(before, own):
            raise ValueError(
                f"{folder} holds a sweep of another experiment ({', '.join(wrong)} differ): choose another folder with --out"
            )
        if storage is not None and without_password(storage) != kept:
            raise ValueError(
                f"the trials of {folder} are in {kept or 'its own file'}, not in {without_password(storage)}: choose another folder with --out"
            )
        if study is not None and study not in (called, digest(own) if called is None else None):
            raise ValueError(
                f"the sweep of {folder} is called {called or digest(own)}, not {study}: leave --study out, or choose another folder with --out"
            )
        return cls(folder, spec, own, storage or kept, called)

    @property
    def about(self) -> dict[str, Any]:
        """What the storage keeps of the sweep beside its trials."""
        return {"identity": self.identity, "spec": self.spec.to_dict()}

    def save(self) -> None:
        """Write the folder's ``sweep.json``. Passwords stay out of it."""
        storage = None if self.storage is None else without_password(self.storage)
        named = {} if self.study is None else {"study": self.study}
        write_json(self.folder / SWEEP_FILE, {**self.about, "storage": storage, **named})

    def save_result(self, result: SweepResult) -> None:
        """Write the folder's ``result.json``."""
        write_json(self.folder / RESULT_FILE, result.to_dict(self.identity["data"]))

    def open_trials(self, lease: float | None = None, trouble: Trouble | None = None) -> Trials:
        """The trials in the storage, which is made where there is none.

        Args:
            lease: seconds, as :class:`Trials` takes it. trouble: told while the storage cannot be reached, as
                :class:`Database` takes it.

        Raises:
            ValueError: the storage cannot be opened, or the sweep has another lease.
        """
        return self._trials(lease, trouble, make=True)

    def read_trials(self) -> Trials:
        """The trials to be read: nothing is written, for a report that makes an empty storage hides that one was lost.

        Raises:
            ValueError: they are lost; the text says how to bring them back.
        """
        try:
            return self._trials(None, None, make=False)
        except MissingError as error:
            again = f"mue sweep --resume {self.folder} finds the results in the folder and tells them anew"
            raise ValueError(f"{error}, or: {again}") from error

    def _trials(self, lease: float | None, trouble: Trouble | None, *, make: bool) -> Trials:
        url = self.storage or f"sqlite:///{self.folder.absolute() / 'optuna.db'}"
        # Named by what must not change, unless a name is given: machines find each other's without being told one.
        name = self.study or digest(self.identity)
        return Trials(Database(url, trouble=trouble, make=make), name, lease, make=make)

    def ask(self, trials: Trials, before: SweepState) -> int:
        """From now on this grid is what is asked for, in the folder and in the storage.

        Args:
            before: the sweep with the grid until now.

        Returns:
            How many open trials of ``before`` were withdrawn.

        Raises:
            ValueError: it is somebody else's sweep: another experiment under this name, or, where the folder had no part in it
                until now, another grid. Nothing was written then.
        """
        points = sampler_of(self.spec.grid).points()
        # Else what waits belongs to a search, which knows its points by itself.
        listed = bool(points or sampler_of(before.spec.grid).points())
        check = partial(self._check_ours, where=trials.database.name, new=not (self.folder / SWEEP_FILE).exists())
        gone = trials.ask(self.about, points, only=listed, check=check)
        self.save()
        return gone

    def _check_ours(self, about: Mapping[str, Any] | None, *, where: str, new: bool) -> None:
        """Refuse a study that is a sweep of something else, or of somebody else.

        Args:
            about: what it is a sweep of; None: nothing yet. where: the storage, for messages.
            new: the folder had no part in it until now, so that its grid may be no change of the one there.
        """
        if about is None:
            return
        if self.study is not None and (wrong := _differing(about["identity"], self.identity)):
            raise ValueError(
                f"{self.study} in {where} is a sweep of another experiment ({', '.join(wrong)} differ): choose another name with --study"
            )
        # How runs are laid out may differ from machine to machine.
        there, here = ({**grid, "runner": None} for grid in (about["spec"]["grid"], self.spec.grid.to_dict()))
        if new and (wrong := _differing(there, here)):
            key = wrong[0]
            raise ValueError(
                f"{where} holds another sweep of this base ({', '.join(wrong)} differ: {key} is {_listed(there.get(key))} there,"
                f" {_listed(here.get(key))} here): give this one a name of its own with --study NAME, or take part in that one with its file"
            )

    def with_current_grid(self, trials: Trials) -> SweepState:
        """The sweep with the grid of the file that was started last, on whatever machine: that is what is asked for.

        How this machine lays out its runs stays its own.
        """
        about = trials.described()
        if about is None:
            return self
        try:
            grid = SweepSpec.from_dict(about["spec"]).grid
        except (KeyError, TypeError, ValueError) as error:
            name = trials.database.name
            raise ValueError(
                f"{name} was last used by another version of mue ({error}): use the same on all machines"
            ) from error
        return replace(self, spec=replace(self.spec, grid=replace(grid, runner=self.spec.grid.runner)))


def join(folder: Path, storage: str, study: str | None) -> None:
    """Make ``folder`` one of a sweep in a shared storage, on a machine that has had no part in it.

    Args:
        storage: its URL. study: the sweep's name in the storage, where it holds several.

    Raises:
        ValueError: the folder holds a sweep already; the storage holds none, or several and ``study`` names none of them.
    """
    path = folder / SWEEP_FILE
    if path.exists():
        raise ValueError(
            f"{folder} holds a sweep, which knows its storage: leave --storage out, or name another folder"
        )
    database = Database(storage, make=False)
    found = {name: json.loads(about) for name, about in database.studies("sweep").items()}
    if not found:
        raise ValueError(f"{database.name} holds no sweep")
    if study not in found and (study or len(found) > 1):
        lines = [f"{name} ({_described(about['identity'])})" for name, about in found.items()]
        raise ValueError(f"choose one of the sweeps in {database.name} with --study:\n  " + "\n  ".join(lines))
    name = study or next(iter(found))
    named = {} if name == digest(found[name]["identity"]) else {"study": name}
    write_json(path, {**found[name], "storage": database.name, **named})


def shared_sweep(specs: Mapping[str, SweepSpec], storage: str, study: str | None, data_hash: str) -> str | None:
    """Which of several forms of a sweep a shared storage has, by its key in ``specs``; None where it has none of them.

    Args:
        storage: its URL. study: the sweep's name there; None: a sweep is known by what it is. data_hash: of the corpus.
    """
    try:
        found = Database(storage, make=False).studies("sweep")
    except MissingError:
        return None
    there = [digest(json.loads(about)["identity"]) for name, about in found.items() if study in (None, name)]
    return next((key for key, spec in specs.items() if digest(spec.identity(data_hash)) in there), None)


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [key for key in {**here, **there} if digest(there.get(key)) != digest(here.get(key))]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _described(identity: dict[str, Any]) -> str:
    training = identity["training"]
    return f"{shape_from_dict(identity['base']).name}, {training['steps']} steps of {training['batch']} tokens"
