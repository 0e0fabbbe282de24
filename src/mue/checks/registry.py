"""Every check of :func:`mue.check` by name. A check is one file: a function that yields findings, registered here.

@check_of("no biases", needs=("roles",))
def no_biases(ctx: Context) -> Iterator[Finding]: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mue.checks.context import Context
from mue.checks.report import Finding
from mue.rules.roles import TASKS
from mue.util.errors import nearest
from mue.util.registry import Registry

NEEDS = ("roles", "plan", "values", "batch")
RunCheck = Callable[[Context], Iterator[Finding]]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: as ``only`` and ``skip`` have it, and as its findings say. run: looks, and yields what it found.
        needs: of :data:`NEEDS`: every tensor has a role; the model is the planned one; tensors have values (not on meta);
            there is a batch. Where one of them is lacking, the check is left out with the reason.
        otherwise: what runs in that case instead, where roles are all it needs.
        task: the field of a shape, such as ``image``, without which there is nothing to look at: reports on other shapes do not have it.
    """

    name: str
    run: RunCheck
    needs: tuple[str, ...] = ()
    otherwise: RunCheck | None = None
    task: str | None = None
    defined_in: str = field(default="", compare=False)


CHECKS: Registry[Check] = Registry("check", home="mue.checks.subjects")


def check_of(
    name: str,
    place: float = 100.0,
    needs: tuple[str, ...] = (),
    otherwise: RunCheck | None = None,
    task: str | None = None,
) -> Callable[[RunCheck], RunCheck]:
    """A decorator that makes a function one of the checks; for the arguments see :class:`Check`.

    ``place`` is its turn: cheap ones come first, and one that cannot run the model tells those after it.

    Raises:
        ValueError: a need that is none of :data:`NEEDS`; a task that no role has; a name that is taken.
    """
    for need in needs:
        if need not in NEEDS:
            raise ValueError(f"check {name!r} has the unknown need {need!r}{nearest(need, NEEDS)}")
    if task is not None and task not in TASKS:
        raise ValueError(f"check {name!r} has the unknown task {task!r}{nearest(task, TASKS)}")

    def add(run: RunCheck) -> RunCheck:
        CHECKS.register(name, place)(Check(name, run, needs, otherwise, task, f"{run.__module__}.{run.__qualname__}"))
        return run

    return add
