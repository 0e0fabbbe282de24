"""The runs of claims as a study's loop takes them: which are missing, and a row for each that ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claims.quantities import Trained, measure
from claims.spec import Arm, Claim, Claims
from mue.lab.data import Corpus
from mue.lab.study.rows import StudyFolder
from mue.lab.train.run import Run


@dataclass(frozen=True)
class Wanted:
    """A run that some claim needs, and what for."""

    claim: Claim
    arm: Arm
    seed: int
    run: Run

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.claim.name}: {self.arm.name} seed {self.seed}"


class ClaimSchedule:
    """The runs of some claims on a corpus.

    Args:
        claims: all there are. chosen: those whose runs are to be trained. data: as a run keeps it.
    """

    def __init__(self, claims: Claims, chosen: Sequence[Claim], data: Mapping[str, Any]) -> None:
        self.spec, self.data = claims, data
        self._all: list[Wanted] = []
        for claim in chosen:
            arms = dict.fromkeys(value.arm for value in claim.values)
            for seed in claim.seeds:  # a seed of every arm before the next seed: differences are seen early
                for name in arms:
                    arm = claims.arms[claim.group, name]
                    self._all.append(Wanted(claim, arm, seed, arm.run(seed, data)))

    def missing(self, rows: Mapping[str, Any]) -> list[Wanted]:
        """What is to be trained, each key once.

        Args:
            rows: what has been measured, by key.
        """
        first: dict[str, Wanted] = {}
        for wanted in self._all:
            if wanted.run.key not in rows:
                first.setdefault(wanted.run.key, wanted)
        return list(first.values())


class ClaimFolder(StudyFolder):
    """Runs in a folder, rows in a file that is kept: of each run its result and the quantities that claims read of it.

    Args:
        root: of the runs. file: of the rows. claims: all there are, which say what is read of which run.
        corpus: the text, to measure with; None where rows are only read.
    """

    def __init__(self, root: Path, file: Path, claims: Claims, corpus: Corpus | None = None) -> None:
        super().__init__(root, file)
        self.claims, self.corpus = claims, corpus

    def begin(self, spec: Any, data: Mapping[str, Any]) -> None:
        """Refuse rows of another corpus: losses on two are never mixed; ``ValueError`` says which."""
        for row in super().rows().values():
            if row["data"] != data["hash"]:
                raise ValueError(
                    f"{self.file} has rows on other data (sha256 {row['data'][:16]}, these are {data['hash'][:16]}): its losses"
                    " do not compare, give another --rows"
                )
        self.root.mkdir(parents=True, exist_ok=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows that have all that claims read today, by key: a claim that asks for more makes a row anew, from the run as it lies there."""
        wanted = self.claims.wanted
        return {k: row for k, row in super().rows().items() if wanted.get(row["of"], frozenset()) <= row["seen"].keys()}

    def by_identity(self) -> dict[str, dict[str, Any]]:
        """Every row by the identity of its run, which is the same on any corpus."""
        return {row["of"]: row for row in super().rows().values()}

    def more(self, run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
        """The run's identity and the quantities.

        Raises:
            ValueError: one needs the model, and the run kept no weights.
        """
        assert self.corpus is not None
        of = Arm("", run.plan, run.settings).identity(run.settings.seed)
        trained = Trained(run, result, self.store, self.corpus)
        return {"data": run.data["hash"], "of": of, "seen": measure(trained, self.claims.wanted.get(of, frozenset()))}
