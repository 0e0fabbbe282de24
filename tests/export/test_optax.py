"""The file fed to jax, flax and optax: a flax twin of the lab's model trains as the lab's does, to 1e-9. Run by `make stacks`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import mue
from mue.export import export
from mue.fold import coefficients, fold
from mue.lab.models.language import LanguageModel
from mue.lab.train.run import Settings
from mue.lab.train.schedule import lr_factor
from mue.lab.train.step import planned_optimizer
from support.pages import run_python
from support.paths import ROOT
from support.stack_models import need
from support.stack_values import TARGETS, plan, run

pytestmark = pytest.mark.stacks
STEPS, CLIP = 20, 1.6  # the threshold binds in some steps and not in others


@pytest.fixture
def jax() -> Iterator[ModuleType]:
    """jax on the CPU, in float64; programs that run for a moment are not worth a long compilation."""
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    found = need("jax")
    need("flax")
    found.config.update("jax_platforms", "cpu")
    found.config.update("jax_enable_x64", True)
    yield found
    found.config.update("jax_enable_x64", False)


def twin_of(made: mue.Plan) -> Any:
    from support.flax_twin import Twin

    return Twin(made.target, made.attention_scale)


def arrays(params: Any) -> dict[str, Any]:
    """By path, as the file writes it."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/").removesuffix("/value"): leaf for k, leaf in leaves}


def put(params: Any, values: dict[str, np.ndarray]) -> Any:
    """The tree with other values; they are for the same paths."""
    import jax

    assert {path: x.shape for path, x in arrays(params).items()} == {path: x.shape for path, x in values.items()}
    leaves = [jax.numpy.asarray(values[path]) for path in arrays(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def batches(vocab: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens, following = torch.randint(vocab, (2, 4, 12), generator=generator)
        yield tokens, following


def trained_in_torch(made: mue.Plan, model: LanguageModel, optimizer: torch.optim.Optimizer) -> list[float]:
    """20 steps as the lab takes them; the norms before clipping."""
    peaks, norms = [group["lr"] for group in optimizer.param_groups], []
    for step, (tokens, following) in enumerate(batches(made.target.vocab)):
        optimizer.zero_grad()
        model(tokens, following).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(step, STEPS, made.tuned, Settings())
        optimizer.step()
    return norms


def trained_in_jax(code: dict[str, Any], twin: Any, start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same steps with the optimizer of the file."""
    import jax
    from flax import nnx

    graph, params = nnx.split(twin, nnx.Param)
    params = put(params, start)
    made = code["optimizer"](params, code["schedule"](STEPS))

    @jax.jit
    def step(params: Any, state: Any, tokens: Any, following: Any) -> tuple[Any, Any]:
        gradients = jax.grad(lambda p: nnx.merge(graph, p).loss(tokens, following))(params)
        updates, state = made.update(gradients, state, params)
        return jax.tree.map(lambda x, u: x + u, params, updates), state

    state = made.init(params)
    for tokens, following in batches(twin.embedding.embedding.shape[0]):
        params, state = step(params, state, tokens.numpy(), following.numpy())
    return {path: np.asarray(x) for path, x in arrays(params).items()}


def apart(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> float:
    """The largest relative distance of what 20 steps did to an array."""
    assert mine.keys() == theirs.keys()
    moved = {path: x - start[path] for path, x in theirs.items()}
    return max(np.linalg.norm(x - theirs[p]) / np.linalg.norm(moved[p]) for p, x in mine.items())


@cache
def in_torch(kind: str, optimizer: str) -> tuple[mue.Plan, dict[str, np.ndarray], dict[str, np.ndarray], list[float]]:
    """(plan, start, end, norms before clipping) of the lab's model in multiplier form, as the twin with folded values has them."""
    from support.flax_twin import carried

    before = plan(kind)
    muon = {"optimizer": "muon", "lr": 0.02, "adamw_lr": 3e-3, "momentum": 0.9} if optimizer == "muon" else {}
    made = mue.transfer(before.inputs.base, before.target, before.tuned.replace(clip=CLIP, **muon))
    model = LanguageModel(made.target, made.multipliers, balance="none").double()
    made.init_(model)
    shadow = LanguageModel(made.target, fold(made).multipliers)
    folds = coefficients(fold(made), shadow)
    c = {name: folds[p] for name, p in shadow.named_parameters()}
    start = carried(model, c)
    norms = trained_in_torch(made, model, planned_optimizer(made, model))
    return made, start, carried(model, c), norms


def distance(kind: str, optimizer: str = "adamw", wrong: tuple[str, str] = ("", "")) -> float:
    """How far apart the two end; ``wrong``: what is replaced in the file, and by what."""
    made, start, ended, _ = in_torch(kind, optimizer)
    text = export(made, "optax")
    assert wrong[0] in text
    code = run(text.replace(*wrong))
    return apart(trained_in_jax(code, twin_of(made), start), ended, start)


@pytest.mark.parametrize("kind", ["dense", "dense, then experts", "tied"])
def test_a_twin_trains_as_the_labs_model(kind: str, jax: ModuleType) -> None:
    """Folded values and weighted clipping there, multipliers and plain clipping here: one training."""
    assert distance(kind) < 1e-9
    norms = in_torch(kind, "adamw")[3]
    assert min(norms) < CLIP < max(norms), norms


def test_a_twin_trains_as_the_labs_model_under_muon(jax: ModuleType) -> None:
    assert distance("dense, then experts", "muon") < 1e-9


def test_control_another_clipping_is_another_training(jax: ModuleType) -> None:
    """The plain norm of folded gradients; every value of the file is right."""
    assert distance("tied", wrong=("placed[0].folded if placed", "1.0 if placed")) > 1e-4


def shapes(kind: str, found: ModuleType) -> dict[str, Any]:
    """The twin's arrays without numbers: a flat dict, whose keys are the paths."""
    from flax import nnx

    made = plan(kind)
    state = nnx.eval_shape(lambda: nnx.state(twin_of(made), nnx.Param))
    return arrays(state)


def struct(*shape: int) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, "float32")


def test_the_groups_are_the_plans(jax: ModuleType) -> None:
    for kind in TARGETS:
        made, code = fold(plan(kind)), run(export(plan(kind), "optax"))
        labels = code["labels"](shapes(kind, jax))
        for path, label in labels.items():
            layer = int(path.split("/")[1]) if path.startswith("blocks") else None
            (role,) = {row[1] for row in code["LAYOUT"] if row[0].replace("{layer}", str(layer)) == path}
            v = made.role(role, layer).values
            assert label == f"adamw lr {v.lr!r} decay {v.weight_decay!r} eps {v.eps!r}"


def test_draws_are_the_plans_and_go_by_path(jax: ModuleType) -> None:
    made, code = fold(plan("tied")), run(export(plan("tied"), "optax"))
    params = shapes("tied", jax)
    drawn = jax.jit(lambda key: code["init"](key, params))(jax.random.key(0))
    for path in ("blocks/1/moe/experts_down", "embedding/embedding", "blocks/0/attention/q/kernel"):
        role = next(row[1] for row in code["LAYOUT"] if row[0].replace("{layer}", path.split("/")[1]) == path)
        std = made.role(role, None if role == "embedding" else 0).values.init_std
        assert float(drawn[path].std()) == pytest.approx(std, rel=5 / (2 * drawn[path].size) ** 0.5)
    assert float(drawn["final_norm/scale"][0]) == pytest.approx(made.role("final_norm").constant) != 1
    one = {"blocks/0/attention/k/kernel": params["blocks/0/attention/k/kernel"]}
    again = code["init"](jax.random.key(0), {**one, **{p: x for p, x in params.items() if p not in one}})
    same = "blocks/0/attention/k/kernel"
    assert jax.numpy.allclose(again[same], drawn[same], rtol=1e-12)
    assert not jax.numpy.allclose(again[same], drawn[same.replace("k/", "v/")])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra/kernel": (4, 4)}, r"extra/kernel \(4, 4\) matches 0 rows"),
        ({"blocks/0/attention/q/kernel": None}, "attention_q of layer 0 has 0 numbers, planned 4096"),
        ({"blocks/0/ffn/up/kernel": (96, 64)}, r"blocks/0/ffn/up/kernel \(96, 64\) has fan-in 96, planned 64"),
        ({"blocks/1/moe/experts_up": (4, 64, 32)}, "expert_up of layer 1 has 8192 numbers, planned 16384"),
        ({"blocks/3/attention/q/kernel": (64, 64)}, "the plan has no attention_q in layer 3"),
        ({"blocks/1/moe/experts_up": (64, 32)}, "its row says 3 axes, expert in out"),
        ({"head/kernel": (64, 81)}, "head/kernel .* has fan-out 81, planned 80"),
        ({"final_norm/scale": None}, "rows of LAYOUT match nothing: .*final_norm"),
        ({"head/kernel": "a function"}, "head/kernel is a str and no array"),
    ],
)
def test_another_tree_is_refused(change: dict[str, Any], words: str, jax: ModuleType) -> None:
    code, params = run(export(plan("dense, then experts"), "optax")), shapes("dense, then experts", jax)
    code["labels"](params)
    for path, shape in change.items():
        params[path] = shape if isinstance(shape, str) else struct(*(shape or ()))
        if shape is None:
            del params[path]
    with pytest.raises(ValueError, match=words):
        code["labels"](params)
    with pytest.raises(ValueError, match=words):
        code["optimizer"](params, lambda step: 1.0)


def rewritten(params: dict[str, Any], layout: list[Any], **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    """Paths and rows whose path ends in a key of ``changes`` are left out; the values are what stands in their place."""
    left = {p: x for p, x in params.items() if not any(key in p for key in changes)}
    rows = [row for row in layout if not any(key in row[0] for key in changes)]
    for new_params, new_rows in changes.values():
        left, rows = {**left, **new_params}, [*rows, *new_rows]
    return left, rows


def test_arrays_of_all_layers_and_fused_ones(jax: ModuleType) -> None:
    """What scanned layers hold, heads as an axis, gate and up in one, experts apart, biases, what is frozen, gains of 1 + w."""
    code, params = run(export(plan("experts"), "optax")), shapes("experts", jax)
    q = {"q": struct(2, 64, 4, 16)}, [("q", "attention_q", "layer in out out")]
    both = {"wi": struct(2, 8, 64, 2, 32)}, [("wi", "expert_gate+expert_up", "layer expert in out out")]
    down = {f"{i}/e{e}": struct(32, 64) for i in range(2) for e in range(8)}, [("{layer}/*", "expert_down", "in out")]
    more = (
        {"bias": struct(2, 64), "balance": struct(2, 8), "gain": struct(64), "positions": struct(99, 64)},
        [("bias", "bias of attention_q", "layer vector"), ("balance", "frozen", ""), ("gain", "norm", "vector", 0), ("positions", "position", "in out")],
    )  # fmt: skip
    tree, rows = rewritten(
        params,
        code["LAYOUT"],
        **{"/q/": q, "experts_up": both, "experts_gate": ({}, []), "experts_down": down, "none": more},
    )
    labels, was = code["labels"](tree, rows), code["labels"](params)
    assert labels["q"] == was["blocks/0/attention/q/kernel"] and labels["wi"] == was["blocks/0/moe/experts_up"]
    assert labels["0/e3"] == was["blocks/0/moe/experts_down"] and labels["balance"] == "frozen"
    drawn = code["init"](jax.random.key(0), {**tree, "balance": jax.numpy.ones((2, 8))}, rows)
    assert not drawn["gain"].any() and not drawn["bias"].any() and drawn["balance"].all()
    with pytest.raises(ValueError, match="attention_q has 4096 numbers, planned 8192"):
        code["labels"]({**tree, "q": struct(1, 64, 4, 16)}, rows)
    with pytest.raises(ValueError, match="bias: no role 'bias of atention_q' in this plan"):
        code["labels"](
            tree, [("bias", "bias of atention_q", "layer vector") if row[0] == "bias" else row for row in rows]
        )
    with pytest.raises(ValueError, match="'bias of attention_o': it is folded with it"):
        code["labels"](tree, [("bias", "bias", "layer vector") if row[0] == "bias" else row for row in rows])
    # another value in the last third of the depth: one array for all layers cannot have it
    o = {"o": struct(2, 64, 64)}, [("o", "attention_o", "layer in out")]
    with pytest.raises(ValueError, match="o: attention_o has other values in other layers"):
        code["labels"](*rewritten(params, code["LAYOUT"], **{"/o/": o}))
    fused = {f"{i}/qo": struct(64, 128) for i in range(2)}, [("{layer}/qo", "attention_q+attention_o", "in out")]
    tree, rows = rewritten(params, code["LAYOUT"], **{"/q/": fused, "/o/": ({}, [])})
    with pytest.raises(
        ValueError, match=r"0/qo holds attention_q\+attention_o in one array, which the plan moves apart"
    ):
        code["labels"](tree, rows)


def test_muon_does_not_take_several_matrices_as_one(jax: ModuleType) -> None:
    """Experts and layers along an axis it moves one by one; two projections in one array are refused."""
    made = in_torch("dense, then experts", "muon")[0]
    code, params = run(export(made, "optax")), shapes("dense, then experts", jax)
    both = {"blocks/0/wi": struct(64, 192)}, [("blocks/{layer}/wi", "ffn_gate+ffn_up", "in out")]
    tree, rows = rewritten(params, code["LAYOUT"], **{"ffn/up": both, "ffn/gate": ({}, [])})
    with pytest.raises(
        ValueError, match=r"blocks/0/wi holds ffn_gate\+ffn_up in one array, which the plan moves apart"
    ):
        code["labels"](tree, rows)
    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 4, 2))
    got = code["_orthogonal"](x, ["layer", "expert", "in", "out", "out"])
    one = code["_orthogonal"](x[1, 2].reshape(8, 8), ["in", "out"])
    assert jax.numpy.allclose(got[1, 2].reshape(8, 8), one, rtol=1e-12)
    turned = code["_orthogonal"](jax.numpy.moveaxis(x, 2, 4), ["layer", "expert", "out", "out", "in"])
    assert jax.numpy.allclose(jax.numpy.moveaxis(turned, 4, 2), got, rtol=1e-12)


@pytest.mark.parametrize("shape", ["wsd", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.05, 0.3, 7])
def test_schedules_are_the_labs(shape: str, warmup: float, jax: ModuleType) -> None:
    before = plan("experts")
    made = mue.transfer(before.inputs.base, before.target, before.tuned.replace(warmup=warmup))
    factor = run(export(made, "optax"))["schedule"](50, shape)
    for step in range(50):
        wanted = lr_factor(step, 50, made.tuned, Settings(schedule=shape))
        assert float(factor(jax.numpy.asarray(step, float))) == pytest.approx(wanted, rel=1e-12), step
    with pytest.raises(ValueError, match="shape 'wds' is none of wsd, linear, cosine"):
        run(export(made, "optax"))["schedule"](50, "wds")


def test_equinox(jax: ModuleType) -> None:
    """A module of equinox, its matrices (out, in): arrays alone are parameters, and a step goes through."""
    eqx, optax = need("equinox"), need("optax")

    class Part(eqx.Module):
        weight: Any
        activation: Any = jax.nn.silu

    class Tree(eqx.Module):
        parts: dict[str, Any]

    def module(names: dict[str, Any]) -> Any:
        """Dotted names as a tree of modules; numbers are places in a list."""
        if not isinstance(names, dict):
            return names
        if set(names) == {"weight"}:
            return Part(names["weight"])
        made = {name: module(inner) for name, inner in names.items()}
        return list(made.values()) if all(name.isdigit() for name in made) else made

    made, nested = plan("dense"), {}
    for path, x in shapes("dense", jax).items():
        *above, last = path.split("/")
        here = nested
        for name in above:
            here = here.setdefault(name, {})
        last = "weight"
        here[last] = jax.numpy.ones(x.shape if "embedding" in path else x.shape[::-1])
    model = module(nested)
    code, params = run(export(made, "optax", "equinox")), eqx.filter(model, eqx.is_inexact_array)
    params = code["init"](jax.random.key(1), params)
    transform = code["optimizer"](params, code["schedule"](10))
    updates, _ = transform.update(jax.tree.map(jax.numpy.ones_like, params), transform.init(params), params)
    after = eqx.apply_updates(model, updates)
    assert after["blocks"][1]["attention"]["q"].activation is jax.nn.silu
    assert (after["blocks"][1]["ffn"]["up"].weight < 1).all() and optax.tree.norm(updates) > 0


def test_the_page_for_jax_runs(jax: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as a user has it."""
    jax.config.update("jax_enable_x64", False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "recipe", raising=False)
    page = "docs/start/jax.md"
    names = run_python((ROOT / page).read_text(encoding="utf-8"), page)
    assert names["losses"][-1] < names["losses"][0]
