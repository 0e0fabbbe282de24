"""The report of a sweep, finished or not: where the valley lies, the cells beside each other, who is training what.

Every trial is in ``trials.csv`` beside the page; the page itself stays readable at any number of them.
"""

from __future__ import annotations

import csv as csv_module
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mue.lab.report import plots
from mue.lab.report.page import Section, text, write_report
from mue.lab.report.routers import router_sections, routers_table
from mue.lab.sweep.result import Cell, SweepResult, counted, summarise, tuned_words
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.state import SweepState
from mue.lab.sweep.trial import OPEN, State, Trial
from mue.lab.train.run import Run, Settings, Store
from mue.lab.train.task import task_of
from mue.lab.valley.cell import ADAMW_LR, BETAS, CellValues
from mue.util.files import write_atomic

_VALLEYS = 8  # drawn: as many as plots.CYCLE has colours
_DRAWN = 500  # runs, as vectors: more make a heavy page
_ROWS = 100  # of a table: the page stays readable at 10,000 trials, and trials.csv has them all
_COLUMNS = 20  # of the map
_ROUTERS = 12  # runs whose routers are compared: the lowest
_VALUES, _MEASURED = ("lr", "weight_decay", "init_std", "seed"), ("val_loss", "loss", "step", "seconds")
COLUMNS = ("trial", "state", *_VALUES, *_MEASURED, "worker", "run")
"""Of ``trials.csv``; beta1, beta2 and adamw_lr come after them where the sweep looks for them."""


def sweep_report(folder: Path, *, csv: Path | None = None, result: SweepResult | None = None) -> Path:
    """Write ``report.html``, its pictures and ``trials.csv`` of the sweep in ``folder``.

    Args:
        csv: write every trial here as well. result: of a sweep that has just ended; None: from its storage.

    Returns:
        The page's path.

    Raises:
        ValueError: the folder holds no sweep, or its storage cannot be opened.
    """
    state = SweepState.load(folder)
    if result is None:
        stored = state.read_trials()
        spec, trials = state.with_current_grid(stored).spec, stored.all()
    else:
        spec, trials = result.spec, list(result.trials)
    for path in {folder / "trials.csv", csv or folder / "trials.csv"}:
        write_trials(path, trials)
    going = sum(t.state in OPEN for t in trials)
    sections = []
    lead = "no run has a loss yet"
    if any(math.isfinite(t.loss) for t in counted(trials)):
        result = result or summarise(spec, trials)
        lead = ("so far: " if going else "") + tuned_words(result)
        sections += [sweep_section(result.to_dict(state.identity["data"]), result.cells), *cells_sections(result.cells)]
    if why := sampler_of(spec.grid).why_done(trials):
        sections[:0] = [Section(id="search", title="The search", texts=[text(why + ".")])]
    if any(block.experts for block in spec.base.blocks):
        sections += experts_sections(folder, trials)
    sections += [work_section(trials), trials_section(trials)]
    title = "Sweep of the dense base" + (f", {len(trials) - going} of {len(trials)} trials" if going else "")
    return write_report(folder, title, lead, sections)


def write_trials(path: Path, trials: Sequence[Trial]) -> None:
    """Every trial as CSV, by number."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            rows = csv_module.writer(file)
            more = [name for name in (*BETAS, ADAMW_LR) if trials and name in trials[0].point]
            rows.writerow([*COLUMNS, *more])
            rows.writerows([*_row(trial), *(trial.point.get(name) for name in more)] for trial in trials)

    write_atomic(path, write)


def _row(trial: Trial) -> list[Any]:
    result, point = trial.result or {}, [trial.point[name] for name in _VALUES]
    measured = [result.get(name) for name in _MEASURED]
    state = "diverged" if trial.state == "COMPLETE" and not math.isfinite(trial.loss) else trial.state.lower()
    return [trial.number, state, *point, *measured, trial.owner, result.get("key")]


def sweep_section(result: Mapping[str, Any], cells: Sequence[Cell]) -> Section:
    """The sweep's deepest valleys.

    Args:
        result: what ``result.json`` holds. cells: its cells, at hand or read back with :meth:`Cell.from_dict`.
    """
    tuned, shape, training = result["tuned"], result["identity"]["base"], result["identity"]["training"]
    ranked = _ranked(cells)
    drawn = [
        {
            "label": _label(cell.values),
            "points": [(p.log2_lr, p.loss) for p in cell.points],
            "valley": cell.valley,
        }
        for cell in ranked[:_VALLEYS]
    ]
    like = ranked[0].values
    betas, rate = tuple(tuned["betas"]) if like.betas else (), (tuned[ADAMW_LR],) if like.adamw_lr else ()
    best = [cell.values for cell in ranked].index(CellValues(tuned["weight_decay"], tuned["init_std"], betas, rate))
    stopped = f", {result['stopped']} stopped early" if result.get("stopped") else ""
    rest = f" The {_VALLEYS} deepest of {len(ranked)} cells are drawn." if len(ranked) > _VALLEYS else ""
    return Section(
        id="sweep",
        title="The one sweep, on the dense base",
        texts=[
            text(
                f"{result['runs']:,} runs of a dense transformer (width {shape['width']}, ffn {shape.get('ffn')}, {shape['layers']} layer{'s' * (shape['layers'] > 1)}),"
                f" {training['steps']:,} steps of {training['batch']:,} tokens each; {result['diverged']} diverged{stopped}.{rest}"
            ),
            text(result["verdict"] + ".", warn=result["edge"] is not None),
            *(text(warning + ".", warn=True) for warning in result.get("warnings", ())),
            *(text(advice + ".") for advice in result.get("advice", ())),
        ],
        figure=plots.sweep_figure(drawn, best, task_of(Settings(**result["identity"]["settings"])).unit),
        in_page="svg" if result["runs"] <= _DRAWN else "png",
        caption="Points are runs, lines the fitted valleys, ▼ the fitted minima. ▲ marks runs above the picture, × those that diverged or were stopped.",
    )


def _label(values: CellValues) -> str:
    more = "".join(f", {'β' if name == 'betas' else name} {value}" for name, value in values.more.items())
    return f"wd {values.weight_decay:.3g}, std {values.init_std:.3g}{more}"


def _ranked(cells: Sequence[Cell]) -> list[Cell]:
    """By fitted minimum; those without one behind, by their lowest run."""
    return sorted(cells, key=lambda cell: (cell.depth, cell.lowest))


def cells_sections(cells: Sequence[Cell]) -> list[Section]:
    """The cells beside each other, where there is more than one: as a table, and as a map of the best betas and AdamW's lr where both axes have values."""
    if len(cells) < 2:
        return []
    more = _ranked(cells)[0].values.more
    lowest = {(c.values.weight_decay, c.values.init_std): c.lowest for c in cells if c.values.more == more}
    rows = []
    for cell in _ranked(cells)[:_ROWS]:
        found, valley = ["–", "–", "–"], cell.valley
        if valley is not None and math.isfinite(valley.minimum):
            low, high = (f"{2.0**x:.3g}" if math.isfinite(x) else "open" for x in valley.interval)
            found = [f"{2.0**valley.minimum:.3g}", f"{low} to {high}", f"{valley.loss_at_minimum:.4f}"]
        rows.append([*cell.values.columns.values(), str(len(cell.points)), *found, _loss_words(cell.lowest)])
    fitted = sum(cell.valley is not None for cell in cells)
    words = f"Of {len(cells)} cells the {fitted} with the lowest runs are fitted." if fitted < len(cells) else ""
    columns = len({std for _, std in lowest})
    words += f" No map beside this: {columns} values of init std are more than its {_COLUMNS} columns." * (
        columns > _COLUMNS
    )
    table = Section(
        id="cells",
        title=f"Weight decay{', init std and ' if more else ' and init std'}{', '.join(more)}: the fitted minima",
        texts=[text(words)] if words else [],
        header=[*cells[0].values.columns, "runs", "lr of the minimum", "95 % interval", "loss there", "lowest run"],
        rows=rows,
        fold=f"{len(rows)} of {len(cells)} cells" if len(cells) > 12 else "",
    )
    return [table, *_map(lowest, "".join(f", at {name} {value}" for name, value in more.items()))]


def _map(lowest: Mapping[tuple[float, float], float], where: str) -> list[Section]:
    """The lowest loss over (weight decay, init std) as a shaded table; nothing where one has one value only, or too many."""
    decays, stds = sorted({wd for wd, _ in lowest}), sorted({std for _, std in lowest})
    finite = sorted(loss for loss in lowest.values() if math.isfinite(loss))
    if len(decays) < 2 or len(stds) < 2 or len(stds) > _COLUMNS or not finite:
        return []
    # White from twice the median's height on: the best are to be told apart, not the worst.
    span = 2 * (finite[len(finite) // 2] - finite[0]) or 1.0
    losses = [[lowest.get((wd, std)) for std in stds] for wd in decays]
    return [
        Section(
            id="map",
            title="Weight decay (down) by init std (across): the lowest run of each cell" + where,
            header=["", *(f"{std:.3g}" for std in stds)],
            rows=[
                [f"{wd:.3g}", *("" if x is None else _loss_words(x) for x in row)]
                for wd, row in zip(decays, losses, strict=True)
            ],
            shades=[
                [0.0, *(0.0 if x is None else max(0.0, 1 - (x - finite[0]) / span) for x in row)] for row in losses
            ],
        )
    ]


def _loss_words(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def experts_sections(folder: Path, trials: Sequence[Trial]) -> list[Section]:
    """The routers of a sweep of a shape with experts: of the lowest run in full, of the next lowest a row each.

    Args:
        folder: of the sweep, where the runs of this machine have their files.
    """
    store = Store(folder)
    done = sorted((t for t in trials if math.isfinite(t.loss) and t.result), key=lambda t: (t.loss, t.number))
    named: list[tuple[str, Run, list[dict[str, Any]]]] = []
    for trial in done:
        key = (trial.result or {}).get("key", "")
        if len(named) < _ROUTERS and (run := store.run(key)):
            named.append((f"trial {trial.number}", run, store.metrics(key)))
    if not named:
        words = "No run's files are here: they lie with the workers that trained it." if done else "No run has ended."
        return [Section(id="routers", title="Routers", texts=[text(words)])]
    (name, run, rows), found = named[0], store.routers(named[0][1].key)
    whole = router_sections(run, rows, found)
    whole[0].title += f" ({name}, the lowest of those here)"
    table = routers_table(named)
    table[0].id, table[0].title = "routers-of-trials", f"Routers at the end, of the {len(named)} lowest runs here"
    return [*whole, *table]


def work_section(trials: Sequence[Trial]) -> Section:
    """Who trained how much, and what is going on."""
    count = Counter(t.state for t in trials)
    words: dict[State, str] = {
        "COMPLETE": "done",
        "PRUNED": "stopped early",
        "RUNNING": "running",
        "WAITING": "waiting",
    }
    facts = [(word, f"{count[state]:,}") for state, word in words.items() if count[state]]
    owners: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.owner and trial.state != "WAITING":
            owners.setdefault(trial.owner, []).append(trial)
    ranked = sorted(owners.items(), key=lambda entry: -len(entry[1]))
    rows = [
        [
            owner.rpartition(":")[0],
            str(sum(t.state not in OPEN for t in found)),
            f"{sum((t.result or {}).get('seconds', 0) for t in found) / 60:.1f}",
            ", ".join(f"trial {t.number} (word {t.quiet or 0:.0f} s ago)" for t in found if t.state == "RUNNING"),
        ]
        for owner, found in ranked[:_ROWS]
    ]
    return Section(
        id="work",
        title="Who trained it",
        facts=facts,
        header=["worker (machine:process)", "trials", "minutes of training", "at work on"],
        rows=rows,
        wrap=(3,),
        fold=f"{len(rows)} of {len(owners)} workers" if len(owners) > 12 else "",
    )


def trials_section(trials: Sequence[Trial]) -> Section:
    """The trials in a table: all of them, or the best."""
    best = trials if len(trials) <= 2 * _ROWS else sorted(trials, key=lambda t: (t.loss, t.number))[:_ROWS]
    rows = []
    for trial in best:
        ended = {"COMPLETE": "diverged", "PRUNED": "stopped"}.get(trial.state, trial.state.lower())
        loss = f"{trial.loss:.4f}" if math.isfinite(trial.loss) else ended
        values = CellValues.of(trial.point)
        point = [f"{trial.point[k]:.4g}" for k in ("lr", "weight_decay", "init_std")]
        rows.append(
            [
                str(trial.number),
                *point,
                *values.more.values(),
                str(trial.seed),
                loss,
                (trial.result or {}).get("key", "–"),
            ]
        )
    return Section(
        id="trials",
        title="Trials",
        texts=[text(f"All {len(trials):,} are in trials.csv beside this page.")],
        header=[
            "trial",
            "lr",
            *(CellValues.of(best[0].point).columns if best else ()),
            "seed",
            "validation loss",
            "run",
        ],
        rows=rows,
        fold="every trial" if len(best) == len(trials) else f"the best {len(rows)}",
    )
