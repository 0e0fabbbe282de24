"""From what was observed of a parameter to its role. Words settle only what shapes and the forward pass leave open."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mue.layouts.observe import names
from mue.layouts.observe.module_flow import UNWATCHED, ModuleFlow
from mue.layouts.observe.param_use import ParamUse
from mue.rules.roles import ROLES

UNNAMED = "its name does not say whether it is the gate or the up projection"


@dataclass(frozen=True)
class Facts:
    """What was observed of the parameters of one name pattern.

    Attributes:
        pattern: the name, its numbers replaced by ``*``. shape: at the tiny size. use: in the tiny forward pass.
        follows: dimensions that each axis follows. is_width: whether each axis *is* the residual width.
        constant: the value a stock model starts this tensor at, where it is one value; None otherwise.
        last_gain: nothing that came after it in the forward pass but the head has parameters.
        flow: what its module was given and what became of that, where somebody watched.
    """

    pattern: str
    shape: tuple[int, ...]
    use: ParamUse
    follows: tuple[frozenset[str], ...]
    is_width: tuple[bool, ...]
    constant: float | None
    last_gain: bool = False
    flow: ModuleFlow = UNWATCHED

    @property
    def tokens(self) -> list[str]:
        return [t for t in self.pattern.lower().split(".") if t != "*"]

    @property
    def words(self) -> list[str]:
        """Tokens without the trailing ``weight``/``bias``."""
        tokens = self.tokens
        return tokens[:-1] if len(tokens) > 1 and tokens[-1] in ("weight", "bias") else tokens

    @property
    def layered(self) -> bool:
        return any(re.fullmatch(names.BLOCKS, t) for t in self.tokens) and "*" in self.pattern

    def named(self, words: str, within: int = 99) -> bool:
        """Whether one of the last ``within`` words of the name is among ``words``."""
        return any(re.fullmatch(words, t) for t in self.words[-within:])


@dataclass(frozen=True)
class Decision:
    """A role with its axes, or the reason why there is none; ``how`` it was decided, for people."""

    role: str | None
    axes: tuple[str, ...]
    how: str
    parts: tuple[str, ...] = ()
    start: float | str | None = None


def decide(f: Facts) -> Decision:
    """The role of one pattern of parameters; ``role`` is None, with the reason, where the evidence does not settle it."""
    if not f.use.seen:
        return Decision(None, (), "the tiny forward pass never used it")
    if f.use.looked_up:
        if "vocabulary" in f.follows[0]:
            return Decision("embedding", ("in", "out"), "rows looked up, as many as the vocabulary")
        if not f.layered and f.named(names.POSITION):
            return Decision("position", ("in", "out"), "rows looked up, positions by name")
        return Decision(None, ("in", "out"), "rows looked up, but they are neither the vocabulary nor positions")
    # Its fan-in is the filter's length, which no width changes: nothing to scale, as with a gain.
    if f.use.convolved:
        return _vector(f, f"a filter of fixed size {f.shape[1:]}: fan-in does not grow, treated like a gain", "own")
    if f.use.summed:
        # One matrix has one fan-in: a tied table that the head multiplies by is looked up, and was met above.
        if len(f.use.summed) > 1 or not next(iter(f.use.summed)):
            return Decision(None, (), f"summed over different axes in different places: {sorted(f.use.summed)}")
        return _matrix(f)
    return _elementwise(f)


def _vector(f: Facts, how: str, start: float | str | None, role: str = "norm") -> Decision:
    return Decision(role, ("vector",) * len(f.shape), how, start=start)


def _elementwise(f: Facts) -> Decision:
    """What is met element by element is a gain, a bias or a rate: here words decide, for shapes and uses are alike."""
    start: float | str = f.constant if f.constant is not None else "own"
    last = f.tokens[-1]
    if re.fullmatch(names.SELECTION_BIAS, last):
        return _vector(f, "named as a selection bias: moved by load, not by the optimizer", "own", "router_bias")
    if re.fullmatch(names.OWN_BIAS, last):
        return _vector(f, f"met element by element, a known kind of vector ({last})", start)
    if last == "bias" or last.endswith("_bias"):
        return _vector(f, "added element by element", start, "bias")
    if f.named(names.QK_NORM, 2) and f.layered:
        return _vector(f, "gain of a query or key norm", start, "qk_norm")
    if f.named(names.NORM, 2) and len(f.shape) == 1:
        if not f.layered and f.last_gain:
            return _vector(f, "gain, the last before the head", start, "final_norm")
        return _vector(f, "gain of a norm", start, "norm")
    if re.fullmatch(names.OWN_START, last):
        return _vector(f, f"met element by element, a known kind of vector ({last})", start)
    return Decision(None, (), "met element by element, and its name is no known gain, bias or rate")


def _matrix(f: Facts) -> Decision:
    """A matrix by what it is summed over and what its axes follow: vocabulary, experts, hidden width or heads.

    The order is that of the evidence: what sizes settle comes first, and words only choose between what they leave
    open.
    """
    inner = next(iter(f.use.summed))
    axes = tuple(
        "in" if i in inner else "expert" if len(f.shape) > 2 and i == 0 else "out" for i in range(len(f.shape))
    )
    axes = tuple(_merged(a, f.follows[i]) for i, a in enumerate(axes))
    if axes.count("expert") and not f.follows[0] & {"experts", "shared experts", "heads"}:
        return Decision(None, axes, "its first axis follows neither experts nor heads")
    seen = f"sums over axis {', '.join(map(str, inner))}"
    into = frozenset[str]().union(*(f.follows[i] for i in inner))
    out = frozenset[str]().union(*(f.follows[i] for i, a in enumerate(axes) if a.endswith("out")))
    from_width = len(inner) == 1 and f.is_width[inner[0]]
    outs = [i for i, a in enumerate(axes) if a.endswith("out")]
    to_width = len(outs) == 1 and f.is_width[outs[0]]
    if "vocabulary" in out and not f.layered:
        return Decision("head", axes, f"{seen}, out follows the vocabulary")
    direction = 1 if from_width and not to_width else -1 if to_width and not from_width else 0
    experts = any(a.startswith("expert") for a in axes) or bool(re.search(r"\bexperts\.\*", f.pattern))
    if any(re.fullmatch(names.NORM, t) and not re.search(names.NORMED_ATTENTION, t) for t in f.words):
        return Decision(None, axes, f"{seen}; a matrix inside a norm is none of the known roles")
    # Several residual streams are mixed by small matrices: d inputs, a number of outputs that does not grow, as a
    # router's.
    if f.named(names.HYPER_CONNECTION):
        if out or not into:
            return Decision(
                None, axes, f"{seen}; a hyper-connection's matrix whose output grows is none of the known roles"
            )
        return Decision(
            "router", axes, f"{seen}: reads the residual streams and weighs a fixed number of things, as a router"
        )
    if ("experts" in out and not experts) or _routes(f):
        return Decision(
            "router",
            axes,
            f"{seen}, out follows the experts" if "experts" in out else f"{seen}, part of a router by name",
        )
    if f.named(names.ATTENTION) and not (f.named(names.FEED_FORWARD) or experts or _feeds(into, out)):
        return _attention(f, axes, seen, direction)
    if f.named(names.ATTENTION) and experts and not _feeds(into, out) and not f.named(names.FEED_FORWARD):
        return _attention(f, axes, seen, direction)
    if f.named(names.FEED_FORWARD) or experts or f.named(names.SHARED) or _feeds(into, out):
        kind = "shared" if f.named(names.SHARED) else "expert" if experts else "ffn"
        return _feed_forward(f, axes, seen, direction, kind, into, out)
    return Decision(None, axes, f"{seen}; nothing says whether it belongs to attention or feed-forward")


def _merged(axis: str, follows: frozenset[str]) -> str:
    """An axis along which experts lie one after another follows their number and their width."""
    both = "experts" in follows and follows & {"ffn", "expert width"}
    return f"expert*{axis}" if both and axis in ("in", "out") else axis


def _routes(f: Facts) -> bool:
    """A matrix that is part of a router by name: the gate of a shared expert, the layers of a router's own MLP."""
    words = f.words
    if any(re.fullmatch(names.ROUTER, t) for t in words):
        return True
    return bool(re.fullmatch(names.SHARED_GATE, words[-1])) or (
        len(words) > 1 and words[-2] == "gate" and f.named(names.FEED_FORWARD)
    )


def _feeds(into: frozenset[str], out: frozenset[str]) -> bool:
    return bool((into | out) & {"ffn", "expert width", "shared width"}) and not (into | out) & {"heads", "head size"}


def _feed_forward(
    f: Facts, axes: tuple[str, ...], seen: str, direction: int, kind: str, into: frozenset[str], out: frozenset[str]
) -> Decision:
    """Up, gate or down: by the direction between residual and hidden width where they differ in size, else by name.

    Gate and up have one shape and one use each, so which is which is always a matter of names.
    """
    hidden = {"ffn", "expert width", "shared width", "shared experts"}
    if direction == 0:
        direction = 1 if out & hidden and not into & hidden else -1 if into & hidden and not out & hidden else 0
    how = f"{seen}, {'width → hidden' if direction > 0 else 'hidden → width'}"
    if direction == 0:  # hidden and residual width cannot be told apart here: the name decides
        direction = -1 if f.named(names.DOWN, 1) else 1 if f.named(f"{names.UP}|{names.GATE}|{names.GATE_UP}", 1) else 0
        how = f"{seen}, direction by name"
    if direction == 0:
        return Decision(None, axes, f"{seen}; neither sizes nor name say whether it goes up or down")
    if direction < 0:
        return Decision(f"{kind}_down", axes, how)
    if f.named(names.GATE_UP, 1):
        return Decision(f"{kind}_gate", axes, f"{how}, gate and up fused", parts=(f"{kind}_gate", f"{kind}_up"))
    if f.named(names.GATE, 1):
        return Decision(f"{kind}_gate", axes, how)
    if f.named(names.UP, 1):
        return Decision(f"{kind}_up", axes, how)
    return Decision(None, axes, f"{how}; {UNNAMED}")


def _attention(f: Facts, axes: tuple[str, ...], seen: str, direction: int) -> Decision:
    """q, k, v or o: the direction tells o from the others, names tell those apart."""
    if f.named(names.FUSED_QKV, 1):
        return Decision(
            "attention_q", axes, f"{seen}, q, k, v fused by name", parts=("attention_q", "attention_k", "attention_v")
        )
    if f.named(names.ATTENTION_OUT, 1) and direction <= 0:
        return Decision("attention_o", axes, f"{seen}, {'inner → width' if direction else 'output by name'}")
    for role, words in (("attention_q", names.QUERY), ("attention_k", names.KEY), ("attention_v", names.VALUE)):
        if f.named(words, 1) and direction >= 0:
            return Decision(role, axes, f"{seen}, {ROLES[role].part} by name")
    if f.named(names.KEY_VALUE, 1) and direction >= 0:
        return Decision("attention_k", axes, f"{seen}, k and v fused by name", parts=("attention_k", "attention_v"))
    if direction < 0:
        return Decision("attention_o", axes, f"{seen}, inner → width")
    if f.named(names.MIXER_GATE, 1):
        return Decision("attention_v", axes, f"{seen}, the mixer's output gate by name")
    if direction > 0:
        return Decision("attention_v", axes, f"{seen}, width → inner: another input of the mixer")
    if not any(f.is_width):
        return Decision("attention_v", axes, f"{seen}, inside the mixer, with its own fan-in")
    return Decision(None, axes, f"{seen}; neither sizes nor name say whether it is an input or the output of attention")
