"""From what was observed of a parameter to its role. Words settle only what shapes and the forward pass leave open."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mue.layouts.observe.param_use import Use
from mue.rules.roles import ROLES

# Parts of a parameter's name. Lower case, whole tokens.
ATTENTION = (
    r"(self_?)?(attn|attention)\w*|\w*_attn|temporal_block|mixer|mamba|mamba_decoder|ssm|conv|short_conv|linear_attn"
)
FEED_FORWARD = r"\w*mlps?|mlp\w*|ffn|feed_?forward|ff|\w*_moe|moe|block_sparse_moe"
SHARED = r"shared_experts?|shared_mlp|shared_expert_mlp"
POSITION = r"wpe|\w*position\w*|\w*pos_emb\w*|token_type_embeddings"
HYPER = r"\w*_hc|hc_\w*|\w*hyper_connection\w*"
QUERY = r"q|q_\w*|wq\w*|query|\w*_q_proj"
KEY = r"k|k_\w*|wk\w*|key"
VALUE = r"v|v_\w*|wv\w*|value"
FUSED = r"w?qkv\w*|c_attn|query_key_value|in_proj_qkv\w*|fused_qkv\w*"
MIXER_GATE = r"output_gate|g_proj|gate_proj|gate"
KEY_VALUE = r"kv\w*|wkv\w*"
OUT = r"o|o_\w*|wo|out|out_proj|output|dense|c_proj|linear_out|output_linear|out_linear"
GATE = r"gate|\w*gate_proj|w1|gate_linear"
GATE_UP = r"gate_up\w*|input_linear|wi_fused|up_gate\w*"
UP = r"up|\w*up_proj\w*|w3|fc1|fc_in|c_fc|dense_h_to_4h|fc|wi|v1|linear_1"
DOWN = r"down|\w*down_proj\w*|w2|fc2|fc_out|c_proj|dense_4h_to_h|output_linear|wo|linear_2"
NORM = r"\w*norm\w*|ln|ln_\w*|\w*_ln|\w*layernorm\w*"
QK_NORM = r"(q|k|query|key|qk)_?(layer)?_?(norm|ln|layernorm)|ln_[qk]|qk_norm"
SELECTION = r"e_score_correction_bias|expert_bias|expert_biases|score_bias|routing_bias|correction_bias"
# Vectors that rules treat like gains and biases, but which start as the model's own code starts them.
OWN = (
    r"sinks?|a_log|d|a|dt_bias|dt|lambda\w*|\w*_scale|scale|temp|alpha\w*|\w*gain|\w*_residual|residual\w*|recurrent_param"
    r"|\w*_bias|base|hc_base|position_bias|\w*_slope|beta|gamma"
)
# Offsets of something other than a matrix product, so that no weight's fold carries over to them.
OWN_BIAS = r"dt_bias|position_bias|\w*(gate|states|residual)_bias"
LAYERED = r"layers?|h|blocks?"


@dataclass(frozen=True)
class Facts:
    """What was observed of the parameters of one name pattern.

    Attributes:
        pattern: the name, its numbers replaced by ``*``. shape: at the tiny size. use: in the tiny forward pass.
        follows: dimensions that each axis follows. is_width: whether each axis *is* the residual width.
        constant: the value a stock model starts this tensor at, where it is one value; None otherwise.
        last_gain: nothing that came after it in the forward pass but the head has parameters.
    """

    pattern: str
    shape: tuple[int, ...]
    use: Use
    follows: tuple[frozenset[str], ...]
    is_width: tuple[bool, ...]
    constant: float | None
    last_gain: bool = False

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
        return any(re.fullmatch(LAYERED, t) for t in self.tokens) and "*" in self.pattern

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
        if not f.layered and f.named(POSITION):
            return Decision("embedding", ("in", "out"), "rows looked up, positions by name")
        return Decision(None, ("in", "out"), "rows looked up, but they are neither the vocabulary nor positions")
    if f.use.convolved:
        return _vector(f, f"a filter of fixed size {f.shape[1:]}: fan-in does not grow, treated like a gain", "own")
    if f.use.summed:
        if len(f.use.summed) > 1 or not next(iter(f.use.summed)):
            return Decision(None, (), f"summed over different axes in different places: {sorted(f.use.summed)}")
        return _matrix(f)
    return _elementwise(f)


def _vector(f: Facts, how: str, start: float | str | None, role: str = "norm") -> Decision:
    return Decision(role, ("vector",) * len(f.shape), how, start=start)


def _elementwise(f: Facts) -> Decision:
    start: float | str = f.constant if f.constant is not None else "own"
    last = f.tokens[-1]
    if re.fullmatch(SELECTION, last):
        return _vector(f, "named as a selection bias: moved by load, not by the optimizer", "own", "router_bias")
    if re.fullmatch(OWN_BIAS, last):
        return _vector(f, f"met element by element, a known kind of vector ({last})", start)
    if last == "bias" or last.endswith("_bias"):
        return _vector(f, "added element by element", start, "bias")
    if f.named(QK_NORM, 2) and f.layered:
        return _vector(f, "gain of a query or key norm", start, "qk_norm")
    if f.named(NORM, 2) and len(f.shape) == 1:
        if not f.layered and f.last_gain:
            return _vector(f, "gain, the last before the head", start, "final_norm")
        return _vector(f, "gain of a norm", start, "norm")
    if re.fullmatch(OWN, last):
        return _vector(f, f"met element by element, a known kind of vector ({last})", start)
    return Decision(None, (), "met element by element, and its name is no known gain, bias or rate")


def _matrix(f: Facts) -> Decision:
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
    if any(re.fullmatch(NORM, t) and not re.search("norm_att", t) for t in f.words):
        return Decision(None, axes, f"{seen}; a matrix inside a norm is none of the known roles")
    if f.named(HYPER):
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
    if f.named(ATTENTION) and not (f.named(FEED_FORWARD) or experts or _feeds(into, out)):
        return _attention(f, axes, seen, direction)
    if f.named(ATTENTION) and experts and not _feeds(into, out) and not f.named(FEED_FORWARD):
        return _attention(f, axes, seen, direction)
    if f.named(FEED_FORWARD) or experts or f.named(SHARED) or _feeds(into, out):
        kind = "shared" if f.named(SHARED) else "expert" if experts else "ffn"
        return _feed_forward(f, axes, seen, direction, kind, into, out)
    return Decision(None, axes, f"{seen}; nothing says whether it belongs to attention or feed-forward")


def _merged(axis: str, follows: frozenset[str]) -> str:
    """An axis along which experts lie one after another follows their number and their width."""
    both = "experts" in follows and follows & {"ffn", "expert width"}
    return f"expert*{axis}" if both and axis in ("in", "out") else axis


def _routes(f: Facts) -> bool:
    """A matrix that is part of a router by name: the gate of a shared expert, the layers of a router's own MLP."""
    words = f.words
    if any(re.fullmatch(r"\w*router\w*", t) for t in words):
        return True
    return bool(re.fullmatch(r"shared_expert_gate", words[-1])) or (
        len(words) > 1 and words[-2] == "gate" and f.named(FEED_FORWARD)
    )


def _feeds(into: frozenset[str], out: frozenset[str]) -> bool:
    return bool((into | out) & {"ffn", "expert width", "shared width"}) and not (into | out) & {"heads", "head size"}


def _feed_forward(
    f: Facts, axes: tuple[str, ...], seen: str, direction: int, kind: str, into: frozenset[str], out: frozenset[str]
) -> Decision:
    hidden = {"ffn", "expert width", "shared width", "shared experts"}
    if direction == 0:
        direction = 1 if out & hidden and not into & hidden else -1 if into & hidden and not out & hidden else 0
    how = f"{seen}, {'width → hidden' if direction > 0 else 'hidden → width'}"
    if direction == 0:  # hidden and residual width cannot be told apart here: the name decides
        direction = -1 if f.named(DOWN, 1) else 1 if f.named(f"{UP}|{GATE}|{GATE_UP}", 1) else 0
        how = f"{seen}, direction by name"
    if direction == 0:
        return Decision(None, axes, f"{seen}; neither sizes nor name say whether it goes up or down")
    if direction < 0:
        return Decision(f"{kind}_down", axes, how)
    if f.named(GATE_UP, 1):
        return Decision(f"{kind}_gate", axes, f"{how}, gate and up fused", parts=(f"{kind}_gate", f"{kind}_up"))
    if f.named(GATE, 1):
        return Decision(f"{kind}_gate", axes, how)
    if f.named(UP, 1):
        return Decision(f"{kind}_up", axes, how)
    return Decision(None, axes, f"{how}; its name does not say whether it is the gate or the up projection")


def _attention(f: Facts, axes: tuple[str, ...], seen: str, direction: int) -> Decision:
    if f.named(FUSED, 1):
        return Decision(
            "attention_q", axes, f"{seen}, q, k, v fused by name", parts=("attention_q", "attention_k", "attention_v")
        )
    if f.named(OUT, 1) and direction <= 0:
        return Decision("attention_o", axes, f"{seen}, {'inner → width' if direction else 'output by name'}")
    for role, words in (("attention_q", QUERY), ("attention_k", KEY), ("attention_v", VALUE)):
        if f.named(words, 1) and direction >= 0:
            return Decision(role, axes, f"{seen}, {ROLES[role].part} by name")
    if f.named(KEY_VALUE, 1) and direction >= 0:
        return Decision("attention_k", axes, f"{seen}, k and v fused by name", parts=("attention_k", "attention_v"))
    if direction < 0:
        return Decision("attention_o", axes, f"{seen}, inner → width")
    if f.named(MIXER_GATE, 1):
        return Decision("attention_v", axes, f"{seen}, the mixer's output gate by name")
    if direction > 0:
        return Decision("attention_v", axes, f"{seen}, width → inner: another input of the mixer")
    if not any(f.is_width):
        return Decision("attention_v", axes, f"{seen}, inside the mixer, with its own fan-in")
    return Decision(None, axes, f"{seen}; neither sizes nor name say whether it is an input or the output of attention")
