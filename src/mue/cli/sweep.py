"""``mue sweep``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mue.cli.app import File, Out, Workers, app, say_data
from mue.config import read_toml


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
    say_data(console, corpus)

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
