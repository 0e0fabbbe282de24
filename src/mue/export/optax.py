"""A plan for JAX: optax groups and draws for a pytree of parameters, flax's or equinox's, found by their paths.

A pytree says nothing of what its arrays are, and a JAX user has no torch model that would. So the file has the plan by role
(ROWS), the user says which path has which role and what its axes are (LAYOUT), and the file's code holds one against the other.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from mue.export.by_role import RoleRow, role_rows
from mue.export.file_text import head
from mue.export.muon import is_muon
from mue.export.paths import BIASED, path_rows
from mue.export.registry import STACKS
from mue.export.rows import folded
from mue.export.scale import needed_scale
from mue.plan.plan import PlanData
from mue.rules.optimizers import BOTH
from mue.rules.table import SHARED_INIT

_CODE = '''

class Row(NamedTuple):
    """What the plan has for a role. layers: in which it holds; None: outside the blocks.

    folded: what the fold multiplied its weights by. elements: of one layer, all experts together.
    """

    role: str
    layers: Any
    lr: float
    weight_decay: float
    eps: float
    std: Any
    constant: Any
    folded: float
    fan_in: Any
    fan_out: Any
    elements: Any
    muon: bool


{ROWS}
# what a bias may stand beside; without a row of its own it has that of "bias"
BIASED = {BIASED}


def _path(keys):
    """A leaf's path as LAYOUT has it, without linen's "params" in front and nnx's "value" at the end."""
    return jax.tree_util.keystr(keys, simple=True, separator="/").removeprefix("params/").removesuffix("/value")


def _planned(role, layer, path):
    """The row of a role in one layer; layer None: the path does not say which, and all have to have the same values."""
    found = [row for row in ROWS if row.role == role]
    if role in [f"bias of {weight}" for weight in BIASED]:
        found = found or [row for row in ROWS if row.role == "bias"]
    if role == "bias" and any(row.role.startswith("bias of ") for row in ROWS):
        raise ValueError(f"{path}: say which weight it is added to, 'bias of attention_o': it is folded with it")
    if not found:
        raise ValueError(f"{path}: no role {role!r} in this plan, only {', '.join(dict.fromkeys(r.role for r in ROWS))}")
    here = [row for row in found if None in (layer, row.layers) or layer in row.layers]
    if not here:
        raise ValueError(f"{path}: the plan has no {role} in layer {layer}")
    if len({row[2:8] for row in here}) > 1:
        raise ValueError(f"{path}: {role} has other values in other layers: an array and a {{layer}} in its path for each")
    return here[0]


def _placed(path, leaf, layout):
    """(row, axes, start, elements by role and layer) of one leaf; None for what is frozen."""
    if not hasattr(leaf, "shape"):
        raise ValueError(f"{path} is a {type(leaf).__name__} and no array: pass the parameters alone")
    hits = []
    for row in layout:
        pattern = re.escape(row[0]).replace(r"\\{layer\\}", r"(?P<layer>\\d+)").replace(r"\\*", "[^/]+")
        if match := re.fullmatch(pattern, path):
            hits.append((row, match.groupdict().get("layer")))
    if len(hits) != 1:
        raise ValueError(f"{path} {leaf.shape} matches {len(hits)} rows of LAYOUT: {[row for row, _ in hits]}")
    (row, layer), (_, role, axes, *start) = hits[0], hits[0][0]
    if start not in ([], [0]):
        raise ValueError(f"{path}: the fourth number of a row is 0, of a gain that the code adds 1 to, got {start}")
    if role == "frozen":
        return row, None
    axes, layer, roles = axes.split(), None if layer is None else int(layer), role.split("+")
    if len(axes) != len(leaf.shape):
        raise ValueError(f"{path} {leaf.shape}: its row says {len(axes)} axes, {' '.join(axes)}")
    parts = [_planned(one, layer, path) for one in roles]
    planned = parts[0]
    if len({part[2:8] for part in parts}) > 1{MUON_PARTS}:
        raise ValueError(f"{path} holds {role} in one array, which the plan moves apart: an array for each")
    out = None if any(part.fan_out is None for part in parts) else sum(part.fan_out for part in parts)
    for axis, wanted in (("in", planned.fan_in), ("out", out)):
        size = math.prod(n for n, name in zip(leaf.shape, axes) if name == axis)
        if wanted is not None and size != wanted:
            raise ValueError(f"{path} {leaf.shape} has fan-{axis} {size}, planned {wanted}: axes {' '.join(axes)}")
    have, total = {}, sum(part.elements or 0 for part in parts)
    for part in parts:
        if part.elements:
            have[part.role, layer if part.layers else None] = math.prod(leaf.shape) * part.elements // total
    return row, (planned, axes, (start or [None])[0], have)


def _found(params, layout):
    """[(path, leaf, placed)] of every leaf, in order, after checking that LAYOUT, the plan and the parameters are one model."""
    leaves = [(_path(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]
    found = [(path, leaf, *_placed(path, leaf, layout)) for path, leaf in leaves]
    used = [row for _, _, row, _ in found]
    if unused := [row for row in layout if row not in used]:
        raise ValueError(f"rows of LAYOUT match nothing: {unused}")
    have = {}
    for *_, placed in found:
        for key, elements in (placed[3] if placed else {}).items():
            have[key] = have.get(key, 0) + elements
    for role in dict.fromkeys(row.role for row in ROWS if row.elements):
        wanted = {i: row.elements for row in ROWS if row.role == role for i in row.layers or [None]}
        here = {layer: n for (name, layer), n in have.items() if name == role}
        if None in here or not here:  # all layers in one array, or numbered in another way
            wanted, here = {None: sum(wanted.values())}, {None: sum(here.values())}
        for layer in {**wanted, **here}:
            if here.get(layer) != wanted.get(layer):
                where = "" if layer is None else f" of layer {layer}"
                raise ValueError(f"{role}{where} has {here.get(layer, 0)} numbers, planned {wanted.get(layer, 0)}")
    return [(path, leaf, placed) for path, leaf, _, placed in found]


def _mapped(of, params, layout):
    """A tree like params of what ``of(path, leaf, placed)`` gives."""
    made = [of(*one) for one in _found(params, layout)]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(params), made)


def init(key, params, layout=LAYOUT):
    """Parameters drawn as planned, like ``params`` (arrays, or what jax.eval_shape gives) in structure, shape and dtype.

    Each array has a key of its own by its path, so that order and sharding change nothing. What is frozen stays.
    """

    def draw(path, leaf, placed):
        if placed is None:
            return leaf
        row, _, start, _ = placed
        if row.std is None:
            # a gain that starts at 0 is multiplied as 1 + w
            return jnp.full(leaf.shape, row.constant - (start == 0 and row.constant != 0), leaf.dtype)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape, dtype)
        return (row.std * noise).astype(leaf.dtype)

    return _mapped(draw, params, layout)


def labels(params, layout=LAYOUT):
    """The label of every parameter, one for each distinct setting: what optax.partition asks for."""
    return _mapped(lambda path, leaf, placed: "frozen" if placed is None else _label(placed[0]), params, layout)


def _label(row):
    return f"{'muon' if row.muon else 'adamw'} lr {row.lr!r} decay {row.weight_decay!r} eps {row.eps!r}"


def schedule(steps, shape="wsd", decay=0.2):
    """The factor on every peak rate: WARMUP, then "wsd" (falls over the last ``decay`` of the run), "linear" or "cosine", to FLOOR."""
    warmup = max(1, round(WARMUP if WARMUP >= 1 else WARMUP * steps))
    after, fall = steps - warmup, max(1, round(decay * steps))
    stable = optax.join_schedules(
        [optax.constant_schedule(1.0), optax.linear_schedule(1.0, FLOOR, fall + 1)], [after - fall]
    )
    # the step after the last would be at the floor, so that the last still moves where it is 0
    shapes = {"wsd": stable, "linear": optax.linear_schedule(1.0, FLOOR, after + 1)}
    shapes["cosine"] = optax.cosine_decay_schedule(1.0, after, FLOOR)
    if shape not in shapes:
        raise ValueError(f"shape {shape!r} is none of {', '.join(shapes)}; any function of the step is a schedule, too")
    return optax.join_schedules([lambda step: (step + 1) / warmup, lambda step: shapes[shape](step + 1)], [warmup])


def optimizer(params, factor, layout=LAYOUT):
    """A group of optax.partition for each distinct setting, after clipping; ``factor(step)`` is a factor on every peak rate."""
    used = set(jax.tree.leaves(labels(params, layout)))
    groups = {_label(row): _moved(row, factor, layout) for row in ROWS if _label(row) in used}
    groups |= {"frozen": optax.set_to_zero()} if "frozen" in used else {}
    steps = optax.partition(groups, lambda tree: labels(tree, layout))
    return steps if CLIP is None else optax.chain(_clip(layout), steps)


def _moved(row, factor, layout):
    """The update of one setting; weight decay is decoupled, and takes the schedule's factor as the rate does."""
    rate = lambda step: row.lr * factor(jnp.asarray(step, float))  # jax divides int32 in float32, under x64 too
{MOVES}    return optax.adamw(rate, b1=BETAS[0], b2=BETAS[1], eps=row.eps, weight_decay=row.weight_decay)


def _clip(layout):
    """Clipping by the global norm that the gradients had before the fold, Σ over ‖c·G‖, as it was tuned at the base."""

    def clip(grads, params):
        weights = _mapped(lambda path, leaf, placed: placed[0].folded if placed else 0.0, grads, layout)
        squares = jax.tree.map(lambda c, g: c * c * jnp.sum(jnp.square(g.astype(_wide(g)))), weights, grads)
        norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
        scale = jnp.minimum(1.0, CLIP / (norm + 1e-6))  # the 1e-6 is that of torch.nn.utils.clip_grad_norm_
        return jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)

    return optax.stateless(clip)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)
'''
_MOVES = """    if row.muon:
        decay = optax.add_decayed_weights(row.weight_decay)
        return optax.chain(_orthogonalised(layout), decay, optax.scale_by_learning_rate(rate))
"""
# optax.contrib.muon is another optimizer: it corrects both terms of Nesterov's average for their bias, by different numbers until
# some 1/(1 - momentum) steps are over; it adds an eps to the norm, so that a fold is not exact; and it knows no √(out/in).
_MUON = '''

def _orthogonalised(layout):
    """Muon (KellerJordan/Muon): momentum with Nesterov's step ahead, then every matrix of an array made orthogonal by itself."""

    def average(old, new):
        return jax.tree.map(lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g, old, new)

    def update(grads, mean, params=None):
        mean = average(mean, grads)
        ahead = average(mean, grads)
        return jax.tree_util.tree_map_with_path(
            lambda keys, x: _orthogonal(x, _placed(_path(keys), x, layout)[1][1]), ahead
        ), mean

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def _orthogonal(x, axes):
    """U·Vᵀ of every matrix, nearly: five steps of Keller's quintic; axes that are neither in nor out count matrices."""
    order = [i for words in (("expert", "layer"), ("in",), ("out",)) for i, axis in enumerate(axes) if axis in words]
    apart = x.transpose(order)
    fan_in = math.prod(n for n, axis in zip(x.shape, axes) if axis == "in")
    fan_out = math.prod(n for n, axis in zip(x.shape, axes) if axis == "out")
    m = apart.reshape(-1, fan_in, fan_out).astype(_wide(x))
    m = m.mT if fan_in > fan_out else m
    m = m / jnp.maximum(jnp.linalg.norm(m, axis=(1, 2), keepdims=True), 1e-7)
    for _ in range(5):
        gram = m @ m.mT
        m = 3.4445 * m + (-4.7750 * gram + 2.0315 * gram @ gram) @ m
    m = m.mT if fan_in > fan_out else m
    return m.reshape(apart.shape).transpose([order.index(i) for i in range(x.ndim)]).astype(x.dtype)
'''
_IMPORTS = (
    "math",
    "re",
    "zlib",
    "from typing import Any, NamedTuple",
    "",
    "jax",
    "from jax import numpy as jnp",
    "optax",
)
_USE = """    params = init(jax.random.key(0), params)              # nnx.state(model, nnx.Param), linen's variables["params"],
    tx = optimizer(params, schedule(steps=25_000))        # or eqx.filter(model, eqx.is_inexact_array)"""


@STACKS.register("optax", place=7)
def optax(plan: PlanData, model: Any) -> str:
    """The file's text.

    Args:
        plan: for AdamW or Muon. model: how the paths of LAYOUT are written, for the user to replace (``"nnx"``, the default,
            ``"linen"``, ``"equinox"``); or the user's own rows, a list of (path, role, axes).

    Raises:
        ValueError: a plan for images; another optimizer, experts in pools or from one draw; a layout with an unknown role or axis.
    """
    plan = folded(plan)
    _refuse(plan)
    rows = role_rows(plan)
    layout = "".join(f"    {row!r},\n" for row in path_rows(dict.fromkeys(row.role for row in rows), model))
    cannot = [
        "what your arrays are: every path has exactly one row of LAYOUT, and every row a path; sizes that are not the plan's are errors",
        "the form of your model: branches that begin with a norm and end without one (which would cancel what is folded before it),"
        " and planned gates without a scale of their own",
        "the shape of the schedule, which is your run's: schedule() has three, and any other function of the step will do",
    ]
    scale = needed_scale(plan, "scale= of jax.nn.dot_product_attention")
    title = "a pytree whose paths LAYOUT names (flax, equinox, ...); for another pass your own rows as layout="
    text = head(plan, title, _USE, cannot, _IMPORTS, scale, sets=("clipping", "warmup", "final lr"))
    numbers = {"BETAS": plan.betas, "CLIP": plan.tuned.clip, "WARMUP": plan.tuned.warmup, "FLOOR": plan.tuned.floor}
    muon = is_muon(plan)
    if muon:
        numbers["MOMENTUM"] = plan.momentum
    text += "\n" + "".join(f"{name} = {value!r}\n" for name, value in numbers.items())
    text += (
        "# (path, role, axes): {layer} is a layer's number, * any one part; each axis is in, out, expert, layer or vector\n"
        f"LAYOUT = [\n{layout}]\n"
    )
    code = _CODE.replace("{ROWS}", "ROWS = [\n" + "".join(map(_code, rows)) + "]")
    code = code.replace("{BIASED}", repr(BIASED))
    code = code.replace("{MOVES}", _MOVES if muon else "")
    return (
        text
        + code.replace("{MUON_PARTS}", " or (planned.muon and len(parts) > 1)" if muon else "")
        + (_MUON if muon else "")
    )


def _code(row: RoleRow) -> str:
    """The row as a call of the file's own ``Row``, whose fields are the same."""
    role, layers, *rest = astuple(row)
    where = repr(layers)
    if layers is not None and layers == tuple(range(layers[0], layers[-1] + 1)):
        where = f"range({layers[0]}, {layers[-1] + 1})"
    return f"    Row({', '.join([repr(role), where, *map(repr, rest)])}),\n"


def _refuse(plan: PlanData) -> None:
    if plan.target.image is not None:
        raise ValueError(
            f'the file for optax has the roles of language models, and {plan.target.name} draws images: export("torch") with the'
            " planned module, or plan.role(...) has its values"
        )
    if plan.tuned.optimizer not in BOTH:
        raise ValueError(
            f"the file for optax speaks AdamW and Muon, and this plan is for {plan.tuned.optimizer!r}: plan.role(...) has its values"
        )
    if plan.target.pool_layers:
        raise ValueError(
            f"the file for optax gives each layer its own experts, and those of {plan.target.name} lie in pools that layers share:"
            " plan without pools"
        )
    for block in plan.blocks:
        for role, planned in block.roles.items():
            if planned.count and planned.init == SHARED_INIT:
                raise ValueError(
                    f"{role}: experts that start from one draw cannot be said in the file for optax, which draws array by array: plan"
                    " experts with draws of their own"
                )
