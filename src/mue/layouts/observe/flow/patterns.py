"""Names of tensors as patterns: which number in a name is the layer, the stage or the expert, and which only says where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Names:
    """The names of a model's parameters, and which of them each branch of the residual stream reads.

    Attributes:
        branches: matrices of each branch, in the order of the forward pass. kinds: of each: attention, ffn, or both.
        experts: parameters of experts that lie apart.
        steps: modules whose number is no expert's (:func:`mue.layouts.layout.chain_steps`).
    """

    names: Sequence[str]
    branches: Sequence[frozenset[str]]
    kinds: Sequence[frozenset[str]]
    experts: frozenset[str]
    steps: frozenset[str] = frozenset()

    @cached_property
    def _blocks(self) -> Mapping[str, frozenset[str]]:
        """Every part of the model whose name ends in a number and that holds a whole branch → the kinds of its branches."""
        found: dict[str, frozenset[str]] = {}
        for members, kinds in zip(self.branches, self.kinds, strict=True):
            for prefix in {p for name in members for p in _numbered(name)}:
                if all(name.startswith(f"{prefix}.") for name in members):
                    found[prefix] = found.get(prefix, frozenset()) | kinds
        return found

    @cached_property
    def _whole(self) -> frozenset[str]:
        """Blocks with all kinds of branches that the model has; empty where they are counted one after another."""
        every = frozenset().union(*self.kinds)
        full = [p for p, kinds in self._blocks.items() if kinds == every]
        if len(every) == 1:  # a block has nothing else that could say how large it is: the outermost
            return frozenset(p for p in full if not any(p.startswith(f"{q}.") for q in full))
        # the innermost: stages.0.blocks.1, and not stages.0
        return frozenset(p for p in full if not any(q.startswith(f"{p}.") for q in full))

    @cached_property
    def _lists(self) -> frozenset[str]:
        """What stands before the number of a whole block: whatever else is counted there is a block, too."""
        return frozenset(p.rpartition(".")[0] for p in self._whole)

    def block(self, name: str) -> str | None:
        """The block that a parameter lies in."""
        inside = [p for p in _numbered(name) if p in self._blocks]
        whole = [p for p in _numbered(name) if p.rpartition(".")[0] in self._lists]
        return whole[-1] if whole else inside[0] if inside and not self._whole else None

    def layers(self, name: str) -> tuple[int, ...]:
        """The layer of a tensor whose pattern does not have it: where branches are counted one after another, or lie in no block."""
        block = self.block(name)
        if block is not None and self._whole:
            return ()
        own = name.rpartition(".")[0] if block is None else block
        mine = next(
            (i for i, m in enumerate(self.branches) if any(n.startswith(f"{own}.") or n == name for n in m)), None
        )
        if mine is None or not (own or block):
            return ()
        alike = [i for i, kinds in enumerate(self.kinds) if kinds == self.kinds[mine]]
        if block is None:
            return (alike.index(mine),) if len(alike) > 1 else ()
        before = {self.block(next(iter(self.branches[i]))) for i in alike if i < mine}
        return (len(before - {block}),)

    def lost(self, name: str) -> bool:
        """Whether nothing says which of several layers a tensor is in."""
        several = any(self.kinds.count(kinds) > 1 for kinds in self.kinds)
        return several and self.block(name) is None and not self.layers(name)

    def pattern(self, name: str) -> str:
        """The name with a star for its layer, and what else a layout has a mark for."""
        block, parts = self.block(name), name.split(".")
        at = len(block.split(".")) - 1 if block is not None else -1
        staged = [i for i in range(max(at, 0)) if parts[i].isdigit() and self._varies(parts, i)]
        starred = block is not None and bool(self._whole)
        out = []
        for i, part in enumerate(parts):
            if part.isdigit() and i == at and starred:
                out.append("{layer}" if staged else "*")
            elif i in staged and starred:
                out.append("{stage}")
            elif part.isdigit() and i > at and name in self.experts and self._counted(parts, i):
                out.append("*" if starred and not staged else "{expert}")
            else:
                out.append(part)
        return ".".join(out)

    def _varies(self, parts: Sequence[str], at: int) -> bool:
        """Whether blocks differ in this number."""
        head = ".".join(parts[:at])
        return len({p.split(".")[at] for p in self._whole if p.startswith(f"{head}.") or not head}) > 1

    def _counted(self, parts: Sequence[str], at: int) -> bool:
        """Whether other experts' tensors have the same name but for this number."""
        return ".".join(parts[: at + 1]) not in self.steps and any(
            len(other) == len(parts)
            and other[at] != parts[at]
            and [*other[:at], *other[at + 1 :]] == [*parts[:at], *parts[at + 1 :]]
            for other in (name.split(".") for name in self.experts)
            if other[at : at + 1] and len(other) == len(parts) and other[at].isdigit()
        )


def _numbered(name: str) -> list[str]:
    """What stands before, and including, each number in a name."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]
