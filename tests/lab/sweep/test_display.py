"""What a sweep shows in the terminal: its valleys as blocks, how far it is, a line for each run that ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mue.lab.data.spec import describe_data, open_corpus
from mue.lab.sweep.display import SweepDisplay, sparkline, sweep_table
from mue.lab.sweep.sampler import sampler_of
from mue.lab.sweep.spec import SweepSpec, sweep_from
from mue.lab.sweep.trial import State, Trial
from mue.lab.train.run import Run
from mue.plan.toml import read_toml


def trial(number: int, lr: float, state: State = "COMPLETE", loss: float | None = None, **more: Any) -> Trial:
    point = {"lr": lr, "weight_decay": 0.1, "init_std": 0.05, "seed": 0}
    result = (
        {"val_loss": loss, "status": "x", "key": f"{number:016x}", "step": 7}
        if state in ("COMPLETE", "PRUNED")
        else None
    )
    return Trial(number + 1, number, state, point, result, **more)


def printed(thing: Any) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - ends with the process
    console.print(thing)
    return console.export_text()


def test_the_valley_in_blocks() -> None:
    valley = [trial(i, 2.0**-9 * 2**i, loss=loss) for i, loss in enumerate((2.5, 2.1, 2.0, 2.2, 9.0))]
    line = sparkline(valley, 2.0)
    assert line[2] == "▁" and line[4] == "█" and line[0] > line[1] > line[2] < line[3]
    odd = [
        trial(5, 1.0, loss=None),
        trial(6, 2.0, "RUNNING"),
        trial(7, 4.0, "WAITING"),
        trial(8, 8.0, "PRUNED"),
    ]
    assert sparkline([*valley, *odd], 2.0)[5:] == "×○·╌"
    many = [trial(i, 1.01**i, loss=2.0 + i / 100) for i in range(1000)]
    assert len(sparkline(many, 2.0)) == 32


def test_the_table_says_how_far_it_is() -> None:
    trials = [trial(0, 0.002, loss=2.5), trial(1, 0.004), trial(2, 0.008, "PRUNED"), trial(3, 0.016, "WAITING")]
    running = trial(4, 0.032, "RUNNING", owner="node7:12:abcd", progress={"step": 40, "loss": 2.75}, quiet=33.0)
    text = printed(sweep_table([*trials, running], "sweep", 150, 65))
    for words in (
        "3 of 5 trials",
        "1 diverged",
        "1 stopped early",
        "1 running",
        "1 waiting",
        "1:05",
        "2.5000",
        "0.002",
    ):
        assert words in text
    for words in ("40/150", "2.750", "node7:12", "33 s ago"):
        assert words in text
    assert "running" not in printed(sweep_table(trials, "sweep", 150))


def test_plain_lines_where_there_is_no_terminal(spec: SweepSpec) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    run, result = a_run(spec), {"status": "finished", "val_loss": 2.25}
    with SweepDisplay(console, "sweep", 150) as display:
        display.look([trial(0, 0.002, loss=2.5), trial(1, 0.004, "WAITING")])
        display.ended(run, result, fresh=True)
        display.ended(run, {**result, "status": "stopped", "val_loss": None, "step": 7}, fresh=False)
        display.ended(run, {**result, "val_loss": None}, fresh=False)
    text = console.export_text()
    assert "1 of 2 trials were done before" in text and "lr 0.008" in text and "loss 2.2500" in text
    assert "stopped at step 7, hopeless" in text and "diverged" in text
    assert display.fresh == 1


@pytest.fixture
def spec(experiment: Path) -> SweepSpec:
    return sweep_from(read_toml(experiment), experiment.parent)


def a_run(spec: SweepSpec) -> Run:
    return spec.run_at(sampler_of(spec.grid).points()[0], describe_data(spec.source, open_corpus(spec.source)))


def test_what_is_said_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """A storage's name may have brackets in it."""
    SweepDisplay(Console(width=200), "sweep", 10).say("the storage runs/[b]/x.db does not answer: see [sweep]")
    assert capsys.readouterr().out == "  the storage runs/[b]/x.db does not answer: see [sweep]\n"
