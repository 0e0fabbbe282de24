"""A model in numbers: no modules, no torch. (A run and its tuned values: :mod:`mue.shapes.hparams`.)

A base model is numbers, so dense → MoE, another depth or another expert count need no name matching. The symbols are
those of the paper: d ``width``, L ``layers``, H_act ``active_width`` (the sum of the down-projection fan-ins that one
token passes through; gate and up are never counted twice), N ``experts``, a ``active``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from mue.shapes.block import MOST_LAYERS, NORMALISED, Block, parse_notation
from mue.shapes.image import Image
from mue.shapes.of_model import OfModel
from mue.shapes.settings import NO_SETTINGS
from mue.shapes.tensors import Tensors, tensors_of
from mue.util.errors import LARGEST, explain_calls, positive, positive_int, true_or_false

DEFAULT_HEAD_DIM = 64
DEFAULT_VOCAB = 256
DEFAULT_SEQUENCE = 1024


@dataclass(frozen=True, kw_only=True)
class Transformer(OfModel):
    """What every transformer here shares; use :class:`Dense`, :class:`MoE` or :class:`Mixed`.

    Attributes:
        head_dim, heads, kv_heads: attention heads. Of the first two, one alone implies the other: heads · head_dim is the width;
            with neither, head_dim is 64. Both are needed where heads · head_dim is another number. ``kv_heads`` defaults to ``heads``.
        vocab, sequence: tokens in the vocabulary and in one training sequence; of images there is no vocabulary, and the sequence is
            an image's patches.
        gated: SwiGLU (gate, up, down) or a plain GELU pair (up, down).
        tied: the head shares the embedding's matrix.
        output_multiplier: forward multiplier A* of the feed-forward branch of a *base*; 1 is a stock model.
        image: what it draws, of a diffusion transformer (2212.09748); None: it is a language model.
    """

    head_dim: int = cast("int", None)  # a number in every shape: __post_init__ sees to it
    heads: int | None = None
    kv_heads: int | None = None
    vocab: int = DEFAULT_VOCAB
    sequence: int = cast("int", None)  # as head_dim
    gated: bool = True
    tied: bool = False
    output_multiplier: float = 1.0
    image: Image | None = None

    kind: ClassVar[str] = ""

    if TYPE_CHECKING:  # fields of the subclasses, or properties computed from them

        @property
        def width(self) -> int: ...
        @property
        def layers(self) -> int: ...
        @property
        def blocks(self) -> tuple[Block, ...]: ...

    def _check(self) -> None:
        self._set_sequence()
        for name in ("width", "vocab", "sequence", *(n for n in ("heads", "kv_heads") if getattr(self, n) is not None)):
            self._whole(name)
        self._whole("layers", most=MOST_LAYERS)
        default = " (the default)" if self.head_dim is None else ""
        self._set_head_dim()
        object.__setattr__(self, "output_multiplier", positive("output_multiplier", self.output_multiplier))
        if self.heads is None and self.width % self.head_dim:
            raise ValueError(
                f"width {self.width} is not divisible by head_dim {self.head_dim}{default}: change one, or give heads"
            )
        if self.kv_heads is not None and self.num_heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} kv_heads do not divide the {self.num_heads} heads")
        for name in ("gated", "tied"):
            true_or_false(name, getattr(self, name))

    def _whole(self, name: str, most: int = LARGEST) -> None:
        """One of the numbers as a plain ``int``, or refused."""
        object.__setattr__(self, name, positive_int(name, getattr(self, name), most))

    def _set_sequence(self) -> None:
        """The length that was given, else that of a text, or as many tokens as an image has patches."""
        if self.image is None:
            if self.sequence is None:
                object.__setattr__(self, "sequence", DEFAULT_SEQUENCE)
            return
        if not isinstance(self.image, Image):
            raise ValueError(f"image must be a mue.Image(size, channels, patch, classes), got {self.image!r}")
        if self.sequence not in (None, self.image.tokens):
            raise ValueError(
                f"sequence = {self.sequence}, but an image of {self.image.text} has {self.image.tokens}: leave sequence out"
            )
        object.__setattr__(self, "sequence", self.image.tokens)
        if self.vocab != DEFAULT_VOCAB or self.tied:
            name = "tied" if self.tied else "vocab"
            raise ValueError(f"{name} is of a language model, and this shape draws images: leave it out")

    def _set_head_dim(self) -> None:
        """The head size that was given; else the width over the heads; else 64."""
        if self.head_dim is None:
            if self.heads is not None and self.width % self.heads:
                raise ValueError(
                    f"width {self.width} is not divisible by {self.heads} heads: change one, or give head_dim"
                )
            # up to format 1 of plan files it was 64 with heads, too (mue.plan.replan)
            implied = DEFAULT_HEAD_DIM if self.heads is None else self.width // self.heads
            object.__setattr__(self, "head_dim", implied)
        self._whole("head_dim")

    @property
    def per_layer(self) -> tuple[Block, ...]:
        """The block of every layer, in order: each of ``blocks`` as often as it has layers."""
        return tuple(block for block in self.blocks for _ in range(block.layers))

    def with_blocks(self, blocks: Sequence[Block]) -> Self:
        """The shape with other blocks in the place of its own, as many of them."""
        own = {f.name for f in fields(self) if f.init}
        values: dict[str, Any] = {"blocks": tuple(blocks)}
        if "blocks" not in own:
            (block,) = blocks
            values = {f.name: getattr(block, f.name) for f in fields(Block) if f.name in own}
        return replace(self, **values)

    @property
    def pool_layers(self) -> tuple[tuple[int, ...], ...]:
        """Of every pool of routed experts the layers that read it; layers with experts of their own are in none."""
        found: list[tuple[int, ...]] = []
        first = 0
        for block in self.blocks:
            starts = range(first, first + block.layers, block.readers) if block.pools else ()
            found += [tuple(range(start, start + block.readers)) for start in starts]
            first += block.layers
        return tuple(found)

    @property
    def num_heads(self) -> int:
        return self.heads if self.heads is not None else self.width // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads if self.kv_heads is not None else self.num_heads

    @property
    def attention_width(self) -> int:
        """heads·head_dim, the fan-in of the attention output projection."""
        return self.num_heads * self.head_dim

    @property
    def active_width(self) -> int | None:
        """H_act; None where blocks differ."""
        widths = {block.active_width for block in self.blocks}
        return widths.pop() if len(widths) == 1 else None

    @property
    def expansion(self) -> float | None:
        """e = H_act/d; None where blocks differ."""
        return None if self.active_width is None else self.active_width / self.width

    def tensors(self) -> Iterator[Tensors]:
        """Every parameter by role, in the order of the forward pass (:func:`mue.shapes.tensors.tensors_of`)."""
        return tensors_of(self)

    def counts(self) -> dict[str, int]:
        """Tensors of the model by role (experts one by one); absent roles are left out."""
        found: dict[str, int] = {}
        for t in self.tensors():
            found[t.role] = found.get(t.role, 0) + t.many
        return found

    @property
    def parameters(self) -> int:
        """Trainable parameters (the balance bias is a buffer)."""
        return sum(t.many * t.size for t in self.tensors() if t.trained)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token is multiplied by, at most (an untied embedding is a look-up and not counted).

        Layers that read one pool may choose the same expert, which counts once for each of them, but never more than there are.
        """
        return sum(min(t.used, t.many) * t.size for t in self.tensors() if t.trained)

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of one token: 6 per active matrix element + 12·L·(heads·head_dim)·sequence for attention.

        Source: PaLM (2204.02311) appendix B, with active parameters in place of all; causal masking not discounted.
        """
        # what an image is multiplied by once is shared by its tokens
        matrices = sum(
            t.used * t.size / self.sequence if t.per_image else t.used * t.size for t in self.tensors() if t.matrix
        )
        return 6.0 * matrices + 12.0 * self.layers * self.attention_width * self.sequence

    @property
    def name(self) -> str:
        """A short name such as ``128e8a1s d1024 L8``."""
        kinds = list(dict.fromkeys(block.notation for block in self.blocks))
        return f"{'+'.join(kinds)} d{self.width} L{self.layers}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers under ``kind`` and the constructor's names; :func:`shape_from_dict` reads them back."""
        return {"kind": self.kind, **_as_dict(self)}


@explain_calls
@dataclass(frozen=True)
class Dense(Transformer):
    """A dense decoder: ``Dense(width, ffn, layers)``; the rest as in :class:`Transformer`."""

    width: int
    ffn: int
    layers: int
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        self._whole("ffn")
        self._check()

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (Block(layers=self.layers, ffn=self.ffn),)


@explain_calls
@dataclass(frozen=True)
class MoE(Transformer):
    """A decoder whose every block has experts; the fields of :class:`Block` and :class:`Transformer`.

    Examples:
        >>> MoE.parse("128e8a1s", width=1024, expert=1024, layers=8).active_width
        9216
    """

    width: int
    expert: int
    layers: int
    experts: int = 0
    active: int = 0
    groups: int = 1
    shared_experts: int = 0
    shared: int | None = None
    router: str = "sigmoid"
    normalize: bool = True
    gates: str = NORMALISED
    gate_moments: tuple[float, float] | None = None
    router_settings: Mapping[str, Any] = NO_SETTINGS
    pools: int = 0
    kind: ClassVar[str] = "moe"

    def __post_init__(self) -> None:
        self._check()
        (block,) = self.blocks  # which checks its own numbers, and has them as plain ones
        for f in fields(Block):
            if f.name not in ("layers", "ffn"):
                object.__setattr__(self, f.name, getattr(block, f.name))

    @classmethod
    def parse(cls, notation: str, **numbers: Any) -> MoE:
        """``MoE.parse("128e8a1s", width=1024, expert=1024, layers=8)``; ``ValueError`` names what cannot be read."""
        return cls(**{**parse_notation(notation), **numbers})

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (
            Block(
                layers=self.layers,
                **{f.name: getattr(self, f.name) for f in fields(Block) if f.name not in ("layers", "ffn")},
            ),
        )

    @property
    def notation(self) -> str:
        """``"128e8a4g1s"``."""
        return self.blocks[0].notation


@explain_calls
@dataclass(frozen=True)
class Mixed(Transformer):
    """Blocks that differ: dense first layers, another number of experts per layer.

    Examples:
        >>> Mixed(1024, (Block(layers=1, ffn=4096), Block(layers=7, experts=64, active=8, expert=512))).layers
        8
    """

    width: int
    blocks: tuple[Block, ...]
    layers: int = field(init=False)
    kind: ClassVar[str] = "mixed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise ValueError("blocks is empty: give at least one")
        object.__setattr__(self, "layers", sum(block.layers for block in self.blocks))
        self._check()


def shape_from_dict(data: dict[str, Any]) -> Transformer:
    """The inverse of ``to_dict``; ``ValueError`` for an unknown kind."""
    data = dict(data)
    kind = data.pop("kind", None)
    kinds: dict[str, type[Transformer]] = {"dense": Dense, "moe": MoE, "mixed": Mixed}
    if kind not in kinds:
        raise ValueError(f"unknown kind of shape {kind!r}; known: {', '.join(kinds)}")
    if kind == "mixed":
        data["blocks"] = tuple(Block(**_moments_tuple(b)) for b in data["blocks"])
    if data.get("image") is not None:
        data["image"] = Image(**data["image"])
    return kinds[kind](**_moments_tuple(data))


def _moments_tuple(data: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if k == "gate_moments" and v is not None else v for k, v in data.items()}


def _as_dict(numbers: Transformer | Block) -> dict[str, Any]:
    """Field by field. What came later is left out where it says nothing, so that files and hashes of before stay as they are."""
    values = {f.name: getattr(numbers, f.name) for f in fields(numbers) if f.init}
    return {name: _plain(value) for name, value in values.items() if name not in _ADDED_LATER or value}


_ADDED_LATER = ("router_settings", "pools", "image")


def _plain(value: Any) -> Any:
    if isinstance(value, Image):
        return asdict(value)
    if isinstance(value, tuple):
        return [_as_dict(item) if isinstance(item, Block) else item for item in value]
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, Mapping) else value
