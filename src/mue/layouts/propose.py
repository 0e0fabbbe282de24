"""``mue inspect --propose``: a table of layout rows for any torch model, each decided or marked for a look.

One forward pass on a few tokens is observed. What a matrix is for follows from where its values go, never from its name, and a
row that rests on anything else is marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mue.layouts.layout import BLOCKS, Layout, canonical, chain_steps, pattern_of, unwrap
from mue.layouts.observe.describe import TINY_BATCH
from mue.layouts.observe.flow.follow import flow_of
from mue.layouts.observe.flow.graph import Node, given_tensors, record_graph
from mue.layouts.observe.flow.locality import acts_at_its_own_position
from mue.layouts.observe.flow.matrices import roles_of
from mue.layouts.observe.flow.patterns import Names
from mue.layouts.observe.flow.vectors import Vectors
from mue.layouts.observe.flow.verdict import Observed, ParamVerdict
from mue.layouts.observe.param_use import param_use
from mue.layouts.observe.run import perturb, run_batch, run_tokens
from mue.rules.roles import ROLES, of_kind
from mue.util.importing import imported, not_taken, user_code


@dataclass(frozen=True)
class ProposedRow:
    """One row of the proposed table.

    Attributes:
        layout: None where nothing is proposed. names: the tensors it is for, in the model's order. how: what was observed.
        look: why a person has to look at it; empty where it was decided.
    """

    pattern: str
    layout: Layout | None
    names: tuple[str, ...]
    how: str
    look: str

    def line(self) -> str:
        """The row as it stands in a method ``layout()``, with its mark."""
        many = "1 tensor" if len(self.names) == 1 else f"{len(self.names)} tensors"
        mark = f"LOOK: {self.look}" if self.look else f"decided: {self.how}"
        if self.layout is None:
            return f'# mue.Layout("{self.pattern}", ROLE, AXES),  # {many}; {mark}'
        return f"{code(self.layout)},  # {many}; {mark}"


@dataclass(frozen=True)
class LayoutProposal:
    """The proposed table of a model."""

    name: str
    rows: tuple[ProposedRow, ...]

    def layout(self) -> list[Layout]:
        """The rows that have a role, marked or not."""
        return [row.layout for row in self.rows if row.layout is not None]

    @property
    def tensors(self) -> int:
        return sum(len(row.names) for row in self.rows)

    @property
    def unmarked(self) -> int:
        """Tensors of rows that were decided."""
        return sum(len(row.names) for row in self.rows if not row.look)

    def text(self) -> str:
        """A method ``layout()`` to paste into the model, and a line of totals."""
        body = "\n".join(f"        {row.line()}" for row in self.rows)
        lookers = self.tensors - self.unmarked
        total = f"# {self.name}: {self.tensors} tensors in {len(self.rows)} rows, {self.unmarked} decided"
        total += f", {lookers} marked LOOK: read each of those rows" if lookers else ""
        return f"    def layout(self):\n        return [\n{_indented(body)}\n        ]\n\n{total}"

    def to_dict(self) -> dict[str, Any]:
        """What ``mue inspect --propose --json`` prints."""
        rows = [
            {
                "pattern": row.pattern,
                "layout": None if row.layout is None else code(row.layout),
                "tensors": list(row.names),
                "decided": not row.look,
                "look": row.look,
                "how": row.how,
            }
            for row in self.rows
        ]
        return {"model": self.name, "tensors": self.tensors, "decided": self.unmarked, "rows": rows}


def _indented(body: str) -> str:
    return "\n".join(f"    {line}" for line in body.splitlines())


def code(row: Layout) -> str:
    """A row as Python."""
    texts = [_quoted(row.pattern), _quoted(row.role), _tuple(row.axes)]
    for name in ("parts", "after"):
        if getattr(row, name):
            texts.append(f"{name}={_tuple(getattr(row, name))}")
    if row.start is not None:
        texts.append(f"start={_quoted(row.start) if isinstance(row.start, str) else repr(row.start)}")
    if row.stacked != 1:
        texts.append(f"stacked={row.stacked}")
    if row.layers:
        texts.append(f"layers={row.layers!r}")
    if row.order != BLOCKS:
        texts.append(f"order={_quoted(row.order)}")
    return f"mue.Layout({', '.join(texts)})"


def _quoted(text: str) -> str:
    return f'"{text}"'


def _tuple(words: Sequence[str]) -> str:
    return f"({', '.join(map(_quoted, words))}{',' if len(words) == 1 else ''})"


def built(source: str) -> tuple[nn.Module, Any]:
    """The model, and the batch or None, that a function of the user's returns: a model, or a mapping with both.

    Args:
        source: ``file.py:function`` or ``module:function``, called without arguments.

    Raises:
        ValueError: nothing of the kind. UserCodeError: it failed.
    """
    made = imported(source)
    if not callable(made) or isinstance(made, type):
        raise ValueError(
            f"{source} is no function: give one without arguments that returns a model, a small one will do"
        )
    if why := not_taken(made):
        raise ValueError(f"{source} is called without arguments, which it does not take ({why})")
    with user_code(source):
        result = made()
    given: Mapping[str, Any] = result if isinstance(result, Mapping) else {"model": result}
    model = given.get("model")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{source} returned {type(result).__name__}: return a model, or a dict with the keys model and batch"
        )
    return model, given.get("batch")


def propose(model: nn.Module, batch: Any = None) -> LayoutProposal:
    """Propose a layout for a model, which is left as it is.

    Args:
        model: of any size, with its weights on a device; a small one is quicker, and its rows hold for all sizes.
        batch: what its forward takes: keywords, arguments, or the one argument; default: a few random tokens.

    Raises:
        ValueError: a model on the meta device, or one that does not run on the batch.
    """
    inner = unwrap(model)
    name = type(inner).__name__
    if any(p.is_meta for p in inner.parameters()):
        raise ValueError(f"{name} is on the meta device: build it with weights, for its forward pass is watched")
    with _as_it_was(inner), torch.random.fork_rng(devices=[]):  # a script that goes on draws what it would have drawn
        seen = _observe(inner, batch)
    verdicts = {n: seen.verdict(n) for n in seen.shapes}
    steps = chain_steps(inner)
    patterns = {n: pattern_of(n, steps) for n in seen.shapes}
    verdicts |= {n: v for n in seen.shapes if (v := _as_siblings(n, verdicts, seen.shapes, patterns)) is not None}
    names = _names(seen, verdicts, steps)
    verdicts = {n: _doubted(n, v, verdicts, seen, names) for n, v in verdicts.items()}
    return LayoutProposal(name, tuple(_rows(verdicts, names)))


def _doubted(
    name: str, verdict: ParamVerdict, verdicts: Mapping[str, ParamVerdict], seen: Observed, names: Names
) -> ParamVerdict:
    """A verdict in the light of the others: what was not seen, and where its tensor lies."""
    look, role = verdict.look, verdict.role
    hidden = next((n for n, v in verdicts.items() if v.unseen and len(seen.shapes[n]) > 1), None)
    if hidden is not None and role in ("norm", "final_norm", "head"):  # a kernel of its own hides what it reads
        look = look or f"{hidden} was not seen in the pass: its values may go between this and the stream's end"
    if role == "final_norm" and names.block(name) is not None:  # it is the norm that it is in every block
        return replace(verdict, role="norm", how="gain of a norm of the residual stream", look=look)
    known = ROLES.get(role or "")
    if known is not None and known.inside and role != "bias" and names.lost(name):
        look = look or "it lies in no block that was recognised: is it in one, say layers=?"
    return replace(verdict, look=look)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards a model has the very values, buffers and modes that it had before.

    A copy would not do: functions that a module made of its own parts would go on using the original's.
    """
    kept = [(p, p.data) for p in model.parameters()]
    modules = [(m, m.training, dict(m._buffers)) for m in model.modules()]
    values = [(b, b.clone()) for b in model.buffers()]
    try:
        for p, data in kept:
            p.data = data.detach().clone()
        yield
    finally:
        for p, data in kept:
            p.data = data
        with torch.no_grad():
            for b, old in values:
                b.copy_(old)
        for m, training, buffers in modules:
            m.training = training
            m._buffers.clear()
            m._buffers.update(buffers)


def _observe(model: nn.Module, batch: Any) -> Observed:
    """Run a model once, off its start, and read the pass."""
    name = type(model).__name__
    torch.manual_seed(0)
    model = model.float().eval()
    shapes = {canonical(n): tuple(p.shape) for n, p in model.named_parameters()}
    constants = {canonical(n): _constant(p) for n, p in model.named_parameters()}
    perturb(model)
    tokens = _tokens(model) if batch is None else None
    run: Callable[[], object] = (
        (lambda: run_batch(model, batch)) if tokens is None else (lambda: run_tokens(model, tokens))
    )
    given = given_tensors(batch if tokens is None else tokens)
    seen: list[tuple[list[Node], frozenset[int]]] = []
    hint = "the function may return {'model': ..., 'batch': ...}, with what its forward takes"
    with user_code(f"{name} on {'the batch' if tokens is None else f'random tokens ({hint})'}"):
        uses = param_use(model, lambda: seen.append(record_graph(model, run, given)))
    if not seen[0][1]:
        raise ValueError(
            f"{name} returned no tensor from its forward pass: give a function whose model returns logits or a loss"
        )
    flow = flow_of(*seen[0])
    ends = [flow.nodes[b.sum].shape[-1] for b in flow.branches]
    width = max(set(ends), key=ends.count) if ends else 0
    with user_code(name):
        roles = roles_of(flow, width, lambda change, read: acts_at_its_own_position(model, run, given, change, read))
    vectors = Vectors(flow, roles, flow.leads_to([b.sum for b in flow.branches]))
    products = {n: [p for p in flow.products.values() if n in p.parameters] for n in shapes}
    by_name = {canonical(n): u for n, u in uses.items()}
    return Observed(flow, roles, vectors, shapes, by_name, constants, given, width, products)


def _constant(p: Tensor) -> float | None:
    first = p.detach().flatten()[0]
    return float(first) if bool((p.detach() == first).all()) else None


def _tokens(model: nn.Module) -> Tensor:
    """Random tokens that every table of the model has rows for."""
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    top = min([90, *rows])
    device = next(model.parameters()).device
    return torch.randint(min(3, top - 1), top, TINY_BATCH).to(device)


def _as_siblings(
    name: str,
    verdicts: Mapping[str, ParamVerdict],
    shapes: Mapping[str, tuple[int, ...]],
    patterns: Mapping[str, str],
) -> ParamVerdict | None:
    """An expert that no token reached, or one, is what the others are whose names have its own pattern."""
    if not verdicts[name].look:
        return None
    pattern, shape = patterns[name], shapes[name]
    alike = [n for n, v in verdicts.items() if patterns[n] == pattern and shapes[n] == shape and not v.look]
    modules = {n.rpartition(".")[0] for n, v in verdicts.items() if v.role in of_kind("expert")}
    found = {verdicts[n] for n in alike if n.rpartition(".")[0] in modules}
    return found.pop() if len(found) == 1 and len({verdicts[n] for n in alike}) == 1 else None


def _names(seen: Observed, verdicts: Mapping[str, ParamVerdict], steps: frozenset[str]) -> Names:
    members: dict[int, set[str]] = {}
    for node, branch in seen.roles.branch_of.items():
        members.setdefault(branch, set()).update(seen.flow.products[node].parameters)
    order = sorted(b for b in members if seen.roles.kinds.get(b))
    experts = {n for n, v in verdicts.items() if v.role in of_kind("expert", "shared")}
    beside = {n for n in verdicts if any(n.rpartition(".")[0] == e.rpartition(".")[0] for e in experts)}
    return Names(
        tuple(verdicts),
        [frozenset(members[b]) for b in order],
        [frozenset(seen.roles.kinds[b]) for b in order],
        frozenset(experts | beside),
        steps,
    )


def _rows(verdicts: Mapping[str, ParamVerdict], names: Names) -> list[ProposedRow]:
    """Tensors of one pattern and one verdict in one row; where verdicts differ, each tensor has its own."""
    groups: dict[str, list[str]] = {}
    for name in verdicts:
        groups.setdefault(names.pattern(name), []).append(name)
    split: dict[str, list[str]] = {}
    for pattern, members in groups.items():
        alike = len({_kind(verdicts[n], names) for n in members}) == 1
        split |= {pattern: members} if alike else {n: [n] for n in members}
    pattern_by_name = {n: pattern for pattern, members in split.items() for n in members}
    rows = []
    for pattern, members in split.items():
        v = verdicts[members[0]]
        after = tuple(sorted({pattern_by_name[a] for n in members for a in verdicts[n].after}))
        row = None
        if v.role is not None:
            inside = v.role not in ("embedding", "position", "final_norm", "head")
            layers = names.layers(members[0]) if inside else ()
            row = Layout(pattern, v.role, v.axes, v.parts, v.start, after=after, layers=layers, order=v.order)
        look = next((verdicts[n].look for n in members if verdicts[n].look), "")
        rows.append(ProposedRow(pattern, row, tuple(members), v.how, look))
    return rows


def _kind(v: ParamVerdict, names: Names) -> ParamVerdict:
    """A verdict without what may differ between tensors of one row."""
    after = frozenset(names.pattern(a) for a in v.after)
    return replace(v, how="", look="", after=after)
