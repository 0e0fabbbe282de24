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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mue.lab.data import Corpus
from mue.lab.data.spec import describe_data
from mue.lab.sweep.result import SweepResult
from mue.lab.sweep.sampler import AXES, sampler_of
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
    """

    folder: Path
    spec: SweepSpec
    identity: dict[str, Any]
    storage: str | None

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
            return cls(folder, SweepSpec.from_dict(stored["spec"]), stored["identity"], stored["storage"])
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no sweep (no {SWEEP_FILE}): {again}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a whole sweep's ({type(error).__name__}: {error}): {again}") from error

    @classmethod
    def start(cls, folder: Path, spec: SweepSpec, corpus: Corpus, storage: str | None) -> SweepState:
        """The sweep of ``spec`` in its folder, new or gone on with. Nothing is written.

        Args:
            storage: of a new sweep; one that is there knows its own.

        Raises:
            ValueError: the folder belongs to another experiment or storage; the data is too short for a new one.
        """
        path, own = folder / SWEEP_FILE, spec.identity(corpus.hash)
        if not path.exists():
            point = {**{axis: getattr(spec.grid, axis)[0] for axis in AXES}, "seed": spec.grid.seeds[0]}
            run = spec.run_at(point, describe_data(spec.source, corpus))
            task_of(spec.settings).batches(run, corpus)  # before the folder is made
            return cls(folder, spec, own, storage)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            before, kept = stored["identity"], stored.get("storage")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): choose another folder with --out, or remove it") from error
        if digest(before) != digest(own):
            wrong = [k for k in own if digest(before.get(k)) != digest(own[k])]
            raise ValueError(
                f"{folder} holds a sweep of another experiment ({', '.join(wrong)} differ): choose another folder with --out"
            )
        if storage is not None and without_password(storage) != kept:
            raise ValueError(
                f"the trials of {folder} are in {kept or 'its own file'}, not in {without_password(storage)}: choose another folder with --out"
            )
        return cls(folder, spec, own, storage or kept)

    @property
    def about(self) -> dict[str, Any]:
        """What the storage keeps of the sweep beside its trials."""
        return {"identity": self.identity, "spec": self.spec.to_dict()}

    def save(self) -> None:
        """Write the folder's ``sweep.json``. Passwords stay out of it."""
        storage = None if self.storage is None else without_password(self.storage)
        write_json(self.folder / SWEEP_FILE, {**self.about, "storage": storage})

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
        # The study is named by what must not change, so that machines find each other's without being told a name.
        return Trials(Database(url, trouble=trouble, make=make), digest(self.identity), lease, make=make)

    def ask(self, trials: Trials, before: SweepState) -> int:
        """From now on this grid is what is asked for, in the folder and in the storage.

        Args:
            before: the sweep with the grid until now.

        Returns:
            How many open trials of ``before`` were withdrawn.
        """
        self.save()
        points = sampler_of(self.spec.grid).points()
        # Else what waits belongs to a search, which knows its points by itself.
        listed = bool(points or sampler_of(before.spec.grid).points())
        return trials.ask(self.about, points, only=listed)

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
    write_json(path, {**found[study or next(iter(found))], "storage": database.name})


def _described(identity: dict[str, Any]) -> str:
    training = identity["training"]
    return f"{shape_from_dict(identity['base']).name}, {training['steps']} steps of {training['batch']} tokens"
