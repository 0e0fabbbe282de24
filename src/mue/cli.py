"""The command line: parses, calls, prints. Every command's ``--help`` teaches it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
except ImportError:  # pragma: no cover - the message is the point
    sys.exit("the mue command needs the lab extra: pip install 'mue[lab]'")

from mue.config import plan_inputs, read_toml
from mue.plan import Plan
from mue.rules import RULES

app = typer.Typer(
    name="mue",
    help="Tune one small dense transformer, train any Mixture-of-Experts with the hyperparameters that follow from it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for runs and results; rerun with the same to go on.")]
Workers = Annotated[
    int | None, typer.Option("--workers", "-w", min=1, help="Training processes at once (default: one for each core).")
]
Tuned = Annotated[Path | None, typer.Option("--tuned", help="Read the tuned values from this finished sweep's folder.")]
File = Annotated[Path, typer.Argument(help="A TOML file; see the example below.", show_default=False)]


@app.command()
def demo(out: Out = Path("runs/demo"), workers: Workers = None) -> None:
    """Run the whole idea on real text in a few minutes, and write a report.

    Sweeps lr × weight decay × init std of a small dense transformer on the Python standard library's own source,
    transfers to a 16e4a1s MoE of twice the width, trains it with those values, and sweeps the learning-rate multiplier
    to show where the MoE's own valley lies. Interrupt it at any time: the next start goes on.
    """
    import os
    import webbrowser

    from mue.lab.demo import demo as run

    console = Console()
    path = run(out, console, workers=workers)
    if console.is_terminal and (
        sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        webbrowser.open(path.absolute().as_uri())


@app.command()
def plan(
    file: File,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, full precision.")] = False,
    sources: Annotated[bool, typer.Option("--sources", help="Show where each row comes from.")] = False,
    tuned: Tuned = None,
    rule: Annotated[str | None, typer.Option(help=f"Override the file's rule: {', '.join(RULES)}.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also save the plan as JSON here (mue.Plan.load reads it).")] = None,
) -> None:
    """Print every hyperparameter of the target, role by role.

    \b
    [bold]Example[/] (leave out both training tables for no change of batch or duration):
      \\[base]               # the dense model you tuned
      width = 128
      ffn = 128
      layers = 8
      \\[base.training]
      batch = 524288        # tokens per step
      steps = 25000
      \\[tuned]
      lr = 1e-3
      weight_decay = 0.1
      init_std = 0.01
      \\[target]             # the MoE you want: 128 experts, 8 active, 1 shared
      moe = "128e8a1s"
      width = 1024
      expert = 1024
      layers = 8
      \\[target.training]
      batch = 524288
      steps = 100000
    """
    from mue.lab.tables import plan_table

    data = {k: v for k, v in read_toml(file).items() if k not in ("data", "run", "sweep")}
    if rule is not None:
        data["rule"] = rule
    data, values = _with_sweep(data, tuned)
    made: Plan = plan_inputs(data, values).plan()
    if save is not None:
        made.save(save)
    if json_:
        print(json.dumps(made.to_dict(), indent=1, ensure_ascii=False))
    else:
        console = Console()
        console.print(plan_table(made, width=console.width, sources=sources))


@app.command()
def rules(
    file: Annotated[Path | None, typer.Argument(help="A plan file, as mue plan reads it.", show_default=False)] = None,
    why: Annotated[str | None, typer.Option("--why", help="Show how each number of this role comes about.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/rules.md: all tables, no file needed.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print factors and reasons as JSON.")] = False,
    tuned: Tuned = None,
) -> None:
    """Compare every published rule on one target, with sources.

    One line per role and number, one column per rule that has an answer; below, the rules that refuse, and why.

    \b
    [bold]Examples[/]
      mue rules moe.toml                      # all rules side by side
      mue rules moe.toml --why expert_down    # one role of the file's rule, step by step
      mue rules --markdown > docs/rules.md
    """
    from mue.rules.compare import compare, lines, why_lines
    from mue.rules.page import markdown as page

    if markdown:
        print(page(), end="")
        return
    if file is None:
        raise ValueError("mue rules needs a plan file (or --markdown): mue rules moe.toml")
    data = {k: v for k, v in read_toml(file).items() if k not in ("data", "run", "sweep")}
    data, values = _with_sweep(data, tuned)
    inputs = plan_inputs(data, values)
    if why is not None:
        from dataclasses import asdict

        from mue.rules.compare import why as derive

        steps = derive(inputs.plan(), why)
        print(json.dumps([asdict(s) for s in steps], indent=1, ensure_ascii=False) if json_ else why_lines(why, steps))
        return
    made = compare(inputs)
    print(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if json_ else lines(made))


@app.command()
def sweep(file: File, out: Out = Path("runs/sweep"), workers: Workers = None) -> None:
    """Sweep lr × weight decay × init std of the base, fit the valley, and write a report.

    Finished runs are never run again: interrupt it, kill it, widen the grid, and start it again with the same --out.

    \b
    [bold]Example[/]
      \\[base]
      width = 64
      ffn = 64
      layers = 3
      head_dim = 32
      sequence = 128
      \\[base.training]
      batch = 1024          # tokens per step
      steps = 150
      \\[data]
      source = "texts/"     # text, JSONL, Parquet, .bin, a folder, or "stdlib"
      \\[sweep]
      lr = \\[0.001, 0.002, 0.004, 0.008]
      weight_decay = \\[0.1]
      init_std = \\[0.05, 0.1]
    """
    from mue.lab.data import Corpus
    from mue.lab.experiment import described, open_corpus, sweep_from
    from mue.lab.progress import RunProgress
    from mue.lab.report import sweep_report
    from mue.lab.run import Run
    from mue.lab.sweep import run_sweep, sweep_runs

    console = Console()
    spec = sweep_from(read_toml(file), file.parent)
    corpus: Corpus = open_corpus(spec.source)
    _say_data(console, corpus)

    def label(run: Run) -> str:
        t = run.plan.tuned
        return f"lr {t.lr:<9.3g} wd {t.weight_decay:<6g} std {t.init_std:<6g} seed {run.settings.seed}"

    with RunProgress(console, "sweep", sweep_runs(spec, described(spec.source, corpus)), label) as progress:
        swept = run_sweep(spec, out, corpus, workers=workers, on_event=progress.event, on_done=progress.done)
    console.print(f"[bold]{swept.verdict}[/]", highlight=False)
    console.print(
        f"tuned: lr {swept.tuned.lr:.4g}, weight decay {swept.tuned.weight_decay:g}, init std {swept.tuned.init_std:g}"
    )
    console.print(f"report: {sweep_report(out)}\nuse it: mue plan FILE.toml --tuned {out}")


@app.command()
def train(file: File, out: Out = Path("runs/train"), tuned: Tuned = None) -> None:
    """Train the file's target (or its base, if it has no target) with the planned values.

    The file is a plan file with a [bold]\\[data][/] table (see mue sweep --help) and optionally
    [bold]\\[run][/]: seed, schedule = "wsd" | "cosine", decay, precision = "fp32" | "bf16", balance = "bias" | "loss",
    eval_every, eval_sequences, log_every. Weights, metrics and a report land in OUT/runs/HASH; a run that was
    interrupted goes on exactly where its last checkpoint stands.

    \b
    [bold]Example[/]
      \\[base]               # without a target the base itself is trained
      width = 64
      ffn = 64
      layers = 3
      head_dim = 32
      sequence = 128
      \\[base.training]
      batch = 1024
      steps = 300
      \\[tuned]
      lr = 0.008
      weight_decay = 0.1
      init_std = 0.15
      \\[data]
      source = "stdlib"
    """
    from mue.lab.data import Corpus
    from mue.lab.experiment import PLAN_TABLES, data_source, described, open_corpus, settings_from, train_plan
    from mue.lab.progress import RunProgress
    from mue.lab.report import run_report
    from mue.lab.run import Run, Store
    from mue.lab.train import train as run_training

    console = Console()
    data, values = _with_sweep(read_toml(file), tuned)
    from mue.config import check_keys

    check_keys(data, (*PLAN_TABLES, "data", "run", "sweep"), "the file's top level")
    made = train_plan(data, values)
    source, settings = data_source(data, file.parent), settings_from(data)
    corpus: Corpus = open_corpus(source)
    _say_data(console, corpus)
    run = Run(made, settings, described(source, corpus))
    store = Store(out)
    console.print(f"run {run.key}, plan {made.hash}: {made.target.name}, {made.target.parameters:,} parameters")
    with RunProgress(console, "train", [run], lambda r: r.plan.target.name) as progress:
        result = run_training(
            run, store, corpus, progress=lambda step, loss: progress.event(run.key, step, loss), keep_weights=True
        )
        progress.done(run, result)
    made.save(store.folder(run.key) / "plan.json")
    console.print(f"report: {run_report(store.folder(run.key))}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a demo, a sweep or a training run.")]) -> None:
    """Write the report of a finished sweep or run again, from what is on disk."""
    from mue.lab.report import run_report, sweep_report

    if (folder / "sweep.json").exists() and (folder / "demo.json").exists():
        from mue.lab.demo import report_again

        path = report_again(folder)
    elif (folder / "result.json").exists() and (folder / "sweep.json").exists():
        path = sweep_report(folder)
    elif (folder / "config.json").exists():
        path = run_report(folder)
    else:
        raise ValueError(
            f"{folder} is neither a finished sweep nor a run: expected sweep.json and result.json, or config.json"
        )
    Console().print(f"report: {path}")


@app.command("inspect")
def inspect_(
    model: Annotated[
        str, typer.Argument(help="A transformers config.json, a folder that holds one, or a family such as qwen3_moe.")
    ] = "",
    json_: Annotated[
        bool, typer.Option("--json", help="Print as JSON; one line per family with --all-families.")
    ] = False,
    all_families: Annotated[
        bool, typer.Option("--all-families", help="Walk every family with experts in the installed transformers.")
    ] = False,
) -> None:
    """Show every parameter of a transformers model with its role, layout and fan-in, and how each was decided.

    Nothing is downloaded and no weights are built: axes are observed on the meta device and in the forward pass of a
    tiny model of the same family. Also shown: what the router's weights sum to, factors the model already has, and its
    shape in mue's numbers. The exit code is 1 where a parameter has no role (or, walking, none of a family has).
    """
    from mue.inspect import inspect, lines, walk

    if bool(model) == all_families:
        raise ValueError("give a model, or --all-families")
    if not all_families:
        found = inspect(model)
        print(json.dumps(found.to_dict(), ensure_ascii=False) if json_ else "\n".join(lines(found)))
        raise typer.Exit(1 if found.undecided else 0)
    results = []
    for result in walk():
        results.append(result)
        verdict = "passed" if result["passed"] else f"refused: {result['reason']}"
        print(json.dumps(result, ensure_ascii=False) if json_ else f"{result['family']}: {verdict}", flush=True)
    if not json_:
        print(f"{sum(r['passed'] for r in results)} of {len(results)} families passed")


@app.command()
def check(
    model: Annotated[
        str,
        typer.Argument(
            help="file.py:function or module:function; or a transformers config or family.", show_default=False
        ),
    ],
    plan: Annotated[Path, typer.Argument(help="A plan: JSON that was saved, or a TOML file.", show_default=False)],
    json_: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", help="Run this check only; may be repeated.")] = None,
    skip: Annotated[list[str] | None, typer.Option("--skip", help="Leave this check out; may be repeated.")] = None,
) -> None:
    """Prove that a model is wired as planned, before money is spent. Exit code 1 where something is wrong.

    The function is called with the plan and returns the model, or a dict with model and any of batch, optimizer, scheduler,
    checkpoint, clip and loss: what is given is checked. A transformers config is built on the meta device and checked by its
    shapes and gates. See docs/checks.md for what each check measures.

    \b
    [bold]Examples[/]
      mue check train.py:build plan.json
      mue check train.py:build plan.json --json > wiring.json   # in CI
      mue check config.json plan.json                            # 671 B without weights
    """
    from mue.checks import check as run
    from mue.checks.command import arguments, read_plan

    made = read_plan(plan)
    report = run(plan=made, raises=False, only=tuple(only or ()), skip=tuple(skip or ()), **arguments(model, made))
    print(report.json() if json_ else report)
    if not report.ok:
        raise typer.Exit(1)


def _with_sweep(data: dict[str, Any], folder: Path | None) -> tuple[dict[str, Any], Any]:
    """The file's tables and the sweep's tuned values (None: the file has its own).

    The sweep must have tuned the file's own base: another shape or another run is an error that names the difference.
    """
    if folder is None:
        return data, None
    from dataclasses import fields, replace

    from mue.config import shape_from, table_of, training_from
    from mue.lab.sweep import tuned_of

    if "tuned" in data:
        raise ValueError(
            "the file has a [tuned] table and --tuned is given: the sweep's values include all of it, remove it"
        )
    found = tuned_of(folder)
    base = table_of(data, "base")
    shape = replace(
        shape_from(base, "base", ("training", "convention", "output_multiplier")), sequence=found.base.sequence
    )
    for f in fields(shape):
        mine, theirs = getattr(shape, f.name), getattr(found.base, f.name, None)
        if mine != theirs:
            raise ValueError(f"{folder} tuned another base: {f.name} is {theirs!r} there and {mine!r} in [base]")
    training = training_from(base, "base")
    if training is not None and training != found.training:
        raise ValueError(
            f"{folder} was tuned with batch {found.training.batch} and {found.training.steps} steps,"
            f" [base.training] has {training.batch} and {training.steps}"
        )
    if training is None and "training" in table_of(data, "target"):
        run = {"batch": found.training.batch, "steps": found.training.steps}
        data = {**data, "base": {**base, "training": run}}
    if found.edge:
        note = f"note: this sweep's best lr is at the {found.edge} edge of its grid: widen it before you trust it"
        print(note, file=sys.stderr)
    return data, found.tuned


def _say_data(console: Console, corpus: Any) -> None:
    skipped = ", ".join(f"{n} {why}" for why, n in corpus.skipped.items())
    console.print(
        f"data: {corpus.files} files, {corpus.bytes / 1e6:.1f} MB, {corpus.tokens:,} tokens, vocabulary {corpus.vocab}, sha256 {corpus.hash[:16]}"
        + (f" (left out: {skipped})" if skipped else ""),
        highlight=False,
    )


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"[red]error:[/] {message}", highlight=False, markup=True, soft_wrap=True)
    sys.exit(code)


def main() -> None:
    """Entry point: a user's mistake is one clear line and exit code 2."""
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted; start the same command again to go on", 130)
    except (ValueError, OSError) as error:
        from rich.markup import escape

        _fail(escape(str(error)), 2)
    except RuntimeError as error:
        if type(error).__module__.startswith("mue."):
            from rich.markup import escape

            _fail(escape(str(error)), 1)
        raise
