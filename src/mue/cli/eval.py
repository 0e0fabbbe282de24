"""``mue eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from mue.cli.app import Tokenizer, app, say_paths
from mue.cli.terminal import print_json

if TYPE_CHECKING:  # they need torch, and a command imports what it calls when it runs
    from mue.lab.trained.active import ActiveCurve, ActivePoint
    from mue.lab.trained.evaluate import TextScores
    from mue.lab.trained.subject import Subject

_ACTIVE = "--active"


class _BareActive(TyperCommand):
    """``--active`` without a value is that with the default range."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from mue.lab.trained.ranges import DEFAULT, is_range

        for i, word in enumerate(args):
            following = " ".join(args[i + 1 : i + 2])
            if word == _ACTIVE and not is_range(following):
                # a word that is no range is RUN, where no other word is
                bare = not following or following.startswith("-") or not self._has_run(ctx, args)
                args = [*args[: i + 1], DEFAULT, *args[i + 1 :]] if bare else args
                break
        return super().parse_args(ctx, args)

    def _has_run(self, ctx: Any, args: list[str]) -> bool:
        """Whether RUN is among the words, those taken that are values of options."""
        values, _, _ = self.make_parser(ctx).parse_args(list(args))
        return isinstance(values.get("run"), str)


_Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="As of mue generate; or a checkpoint folder of transformers, with config.json and safetensors.",
        show_default=False,
    ),
]
_Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="A file or folder of text, all of it held out \\[default: what the run held out].",
        show_default=False,
    ),
]
_Active = Annotated[
    str | None,
    typer.Option(
        _ACTIVE,
        metavar="RANGE",
        help="With other numbers of active experts: 1..12, or 2,4,8, or without a range 1 to three times the trained number.",
        show_default=False,
    ),
]
_Scale = Annotated[
    list[str] | None,
    typer.Option(
        "--scale", help="What the weights of k′ experts sum to: mean, root or sum; may be repeated.", show_default=False
    ),
]
_Sequences = Annotated[
    int | None,
    typer.Option(
        "--sequences",
        min=2,
        help="How many to read, at most; of each folder a quarter \\[default: as many as the run's validation, else 128].",
        show_default=False,
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Where --active leaves active.png and active.json \\[default: the run's folder].",
        show_default=False,
    ),
]


@app.command("eval", cls=_BareActive)
def evaluate(
    run: _Run,
    data: _Data = None,
    active: _Active = None,
    scale: _Scale = None,
    sequences: _Sequences = None,
    tokenizer: Tokenizer = None,
    out: _Out = None,
    json_: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Ask a trained model about held-out text: loss per byte and per token, next-token accuracy, as a whole and by folder.

    Each value comes with its 95 % interval over sequences. Every sequence begins without a past, as in training, and without
    options the loss of the whole is that of the run's own validation.

    With --active the same weights use k′ experts per token instead of the k of training, for every k′ up to all of them, and loss is drawn
    against active FLOPs. What their weights sum to is not what was trained either, and there are two published ways:
    [bold]mean[/] keeps the sum (R = k′ and A planned for k′, whose product is as it was), [bold]root[/] takes √(k′/k) times that (R = k′ under the
    trained A, times √(k/k′): independent experts keep their variance); [bold]sum[/] is R = k′ alone.

    \b
    [bold]Examples[/]
      mue eval runs/demo
      mue eval runs/demo --data texts/            # a row for each folder in it
      mue eval runs/demo --active                 # 1 to 3k; or --active 1..12
      mue eval olmoe/ --data texts/ --active 4..16 --sequences 32     # a stock checkpoint
    """
    import torch

    from mue.lab.trained.evaluate import score
    from mue.lab.trained.subject import subject_of

    if active is None and (scale or out):
        raise ValueError(f"{'--scale' if scale else '--out'} is read only with --active")
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = subject_of(run, data, sequences, tokenizer, place, folders=active is None)
    console = Console(stderr=json_)
    say_paths(
        console, f"{subject.name}, on text {subject.text.source}", *(f"note: {note}" for note in subject.text.notes)
    )
    if active is not None:
        _active(console, subject, active, scale or [], out, json_)
        return
    found = {name: score(subject.logits, windows, subject.bytes_of) for name, windows in subject.text.windows.items()}
    if json_:
        print_json(
            {
                "model": subject.name, "text": subject.text.source, "notes": list(subject.text.notes),
                "scores": {name: scores.to_dict() for name, scores in found.items()}, "left_out": dict(subject.text.left_out),
            }
        )  # fmt: skip
        return
    console.print(_table(found))
    if subject.bytes_of is None:
        console.print(
            "per byte: the text's tokens were made elsewhere; name their tokenizer with --tokenizer", highlight=False
        )
    for name, why in subject.text.left_out.items():
        console.print(f"left out: {escape(name)} ({escape(why)})", highlight=False, soft_wrap=True)


def _table(found: dict[str, TextScores]) -> Table:
    """A row for the whole and for each folder."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("text", "sequences", "tokens", "nats per byte", "nats per token", "next token right, %"):
        table.add_column(title, justify="left" if title == "text" else "right", style="cyan" if title == "text" else "")
    for name, scores in found.items():
        per_byte, right = scores.per_byte, scores.accuracy
        table.add_row(
            escape(name), f"{len(scores.nats):,}", f"{int(sum(scores.tokens)):,}", "–" if per_byte is None else per_byte.text(4),
            scores.per_token.text(4), (type(right)(100 * right.value, 100 * right.half)).text(1),
        )  # fmt: skip
    return table


def _active(console: Console, subject: Subject, text: str, scales: list[str], out: Path | None, json_: bool) -> None:
    """Ask at every k′, show it, and leave the picture with its numbers."""
    from functools import partial

    from rich.progress import Progress

    from mue.lab.train.provenance import provenance
    from mue.lab.trained.active import ActiveCurve, ask
    from mue.lab.trained.figures import active_figure
    from mue.lab.trained.held_out import WHOLE
    from mue.lab.trained.ranges import active_of, scales_of
    from mue.util.files import write_atomic, write_json

    model = subject.any_active()
    (chosen, left_out), ways = active_of(text, model), scales_of(scales, model)
    say_paths(console, *left_out)
    points: list[ActivePoint] = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("asking", total=1 + len(chosen) * len(ways))
        for point in ask(model, chosen, ways, subject.text.windows[WHOLE], subject.bytes_of):
            points.append(point)
            progress.advance(bar)
    curve = ActiveCurve(points[0], tuple(points[1:]))
    folder = out or subject.folder
    said = {"text": subject.text.source, "notes": [*subject.text.notes, *left_out]}
    data = {"command": "mue eval --active", **provenance(), **subject.facts, **said, **curve.to_dict()}
    picture = active_figure(curve, subject.name)
    write_atomic(folder / "active.png", partial(picture.savefig, dpi=160, format="png"))
    write_json(folder / "active.json", data)
    if json_:
        print_json(data)
    else:
        unit = "byte" if subject.bytes_of is not None else "token"
        whole = f"{points[0].scores.loss.text(4)} nats per {unit} as trained, k = {points[0].active}; Δ: above it, on the same {len(points[0].scores.nats)} sequences"
        console.print(whole, highlight=False, soft_wrap=True)
        console.print(_active_table(curve))
    say_paths(console, f"picture: {folder / 'active.png'}, numbers: {folder / 'active.json'}")


def _active_table(curve: ActiveCurve) -> Table:
    """A row for each k′: what it costs, and by how much its loss is above the trained model's, with what the interval says of it."""
    before = curve.trained
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("k′", "MFLOPs", "×", *(column for scale in curve.scales for column in (scale, f"Δ {scale}"))):
        table.add_column(title, justify="right")
    rows = {scale: {p.active: p for p in curve.of(scale)} for scale in curve.scales}
    for k in sorted({p.active for p in curve.points}):
        cells, flops = [], 0.0
        for scale in curve.scales:
            point, flops = rows[scale][k], rows[scale][k].flops
            above = point.scores.above(before.scores)
            # the interval leaves out 0: the difference is more than these sequences' chance
            style = "green" if above.value + above.half < 0 else "red" if above.value - above.half > 0 else "dim"
            same = point.scores == before.scores
            cells += [
                f"{point.scores.loss.value:.4f}",
                "as trained" if same else f"[{style}]{above.value:+.4f} ± {above.half:.4f}[/]",
            ]
        mark = "[bold]" if k == before.active else ""
        table.add_row(f"{mark}{k}", f"{flops / 1e6:.4g}", f"{flops / before.flops:.2f}", *cells)
    return table
