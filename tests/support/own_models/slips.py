"""Wrong wirings of the three models, each with what has to name it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import mue
from support.own_models.case import STEPS, Slip, cosine

Groups = list[dict[str, Any]]
Row = mue.Layout
OUT_IN, IN_OUT, VECTOR = ("out", "in"), ("in", "out"), ("vector",)
STACK, STACK_T = ("expert", "out", "in"), ("expert", "in", "out")
schedules = torch.optim.lr_scheduler


def frozen(part: str) -> Callable[[Any], None]:
    return lambda model: [p.requires_grad_(False) for n, p in model.named_parameters() if part in n] and None


def drawn(name: str, index: int | None = None, std: float = 0.5) -> Callable[[Any], None]:
    """One tensor, or one expert in it, drawn by the model's own code."""

    def change(model: Any) -> None:
        tensor = dict(model.named_parameters())[name].data
        (tensor if index is None else tensor[index]).normal_(0, std)

    return change


def scaled_by_depth(model: Any) -> None:
    for name, p in model.named_parameters():
        if name.endswith(("o.weight", "w2", "proj.weight", ".down")):
            p.data /= 2


def every(**values: Any) -> Callable[[Groups], Groups]:
    return lambda groups: [{**g, **values} for g in groups]


def times(factor: float) -> Callable[[Groups], Groups]:
    return lambda groups: [{**g, "lr": g["lr"] * factor} for g in groups]


def decayed(groups: Groups) -> Groups:
    return [{**g, "weight_decay": g["weight_decay"] or 0.1} for g in groups]


def without_vectors(groups: Groups) -> Groups:
    return [{**g, "params": kept} for g in groups if (kept := [p for p in g["params"] if p.dim() > 1])]


def stale(groups: Groups) -> Groups:
    return [{**g, "params": [copy.deepcopy(p) for p in g["params"]]} for g in groups]


def sgd(groups: Groups) -> Any:
    return torch.optim.SGD([{k: g[k] for k in ("params", "lr", "weight_decay")} for g in groups])


def absolute(optimizer: Any) -> Callable[[int], None]:
    return lambda step: [g.update(lr=4e-3 * min(1, step / 20)) for g in optimizer.param_groups] and None


def elsewhere(optimizer: Any) -> Any:
    return cosine(torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-3))


def training(kind: str, folded: bool) -> Mapping[str, Slip]:
    """What can be done wrong with the plan's groups, whatever the model."""
    one = Slip(kind, "", folded=folded)
    return {
        "lr times the number of devices": replace(one, named="highest rates|lr expected", groups=times(8)),
        "one lr": replace(one, named="groups: .*: lr", groups=every(lr=4e-3)),
        "torch's betas": replace(one, named="betas 0.9, 0.999", groups=every(betas=(0.9, 0.999))),
        "decay on norms": replace(
            one, named=r"norm.*weight_decay|ln.*weight_decay|final.*weight_decay", groups=decayed
        ),
        "vectors left out": replace(one, named="in no group", groups=without_vectors),
        "optimizer of a copy": replace(one, named="holds the old tensors", groups=stale),
        "Adam": replace(one, named="torch.optim.Adam was written", optimizer=torch.optim.Adam),
        "SGD": replace(one, named="torch.optim.SGD was written", optimizer=sgd),
        "amsgrad": replace(one, named="amsgrad=True", optimizer=lambda g: torch.optim.AdamW(g, amsgrad=True)),
        "OneCycleLR with one peak": replace(
            one,
            named="one absolute lr",
            scheduler=lambda o: schedules.OneCycleLR(o, 4e-3, total_steps=STEPS, cycle_momentum=False),
        ),
        "absolute floor": replace(
            one, named="eta_min", scheduler=lambda o: schedules.CosineAnnealingLR(o, STEPS, eta_min=1e-4)
        ),
        "absolute function": replace(one, named="one absolute lr", scheduler=absolute),
        "schedule of another optimizer": replace(one, named="built on another optimizer", scheduler=elsewhere),
        "bf16 weights": replace(one, named="moved|dtype", after=lambda m: m.to(torch.bfloat16) and None),
        "depth-scaled init on top": replace(one, named="init: .*(o.weight)", after=scaled_by_depth),
    }


FUSED = Slip("fused", "")
FUSED_SLIPS = {
    "w2 as up": replace(FUSED, named="moe.w2|expert_down", rows={"w2": Row("blocks.*.moe.w2", "expert_up", STACK)}),
    "shared as dense": replace(
        FUSED, named="shared2.*ffn_down", rows={"shared2": Row("blocks.*.moe.shared2.weight", "ffn_down", OUT_IN)}
    ),
    "router as queries": replace(
        FUSED, named="role router", rows={"router": Row("blocks.*.moe.router.weight", "attention_q", OUT_IN)}
    ),
    "qkv without parts": replace(
        FUSED, named="attention_k", rows={"qkv": Row("blocks.*.qkv.weight", "attention_q", OUT_IN)}
    ),
    "gate and up swapped in the layout": replace(
        FUSED,
        named="w13(.|\n)*gate and up are swapped",
        rows={"w13": Row("blocks.*.moe.w13", "expert_up", STACK, parts=("expert_up", "expert_gate"))},
    ),
    "shared gate and up swapped": replace(FUSED, named="shared13(.|\n)*are swapped", wrong=["shared gate and up"]),
    "final norm as norm": replace(
        FUSED, named="final_norm: give it", rows={"norm": Row("norm.weight", "norm", VECTOR)}
    ),
    "w2 transposed": replace(FUSED, named="moe.w2", rows={"w2": Row("blocks.*.moe.w2", "expert_down", STACK_T)}),
    "router transposed": replace(
        FUSED, named="router.weight.*fan-in", rows={"router": Row("blocks.*.moe.router.weight", "router", IN_OUT)}
    ),
    "embedding transposed": replace(
        FUSED, named="tok.weight.*vocabulary", rows={"tok": Row("tok.weight", "embedding", OUT_IN)}
    ),
    "row for a buffer": replace(
        FUSED,
        named="blocks.0.moe.balance is a buffer",
        rows={"balance": Row("blocks.*.moe.balance", "router_bias", VECTOR)},
    ),
    "no R": replace(FUSED, named="route scale R = 2 is missing", wrong=["route"]),
    "R on the shared expert": replace(FUSED, named="shared experts(.|\n)*R .*applied twice", wrong=["route on shared"]),
    "no A": replace(FUSED, named="output multiplier A = .* is missing", wrong=["no A"]),
    "residual on attention only": replace(
        FUSED, named="residual multiplier = .* is missing", wrong=["residual on attention only"]
    ),
    "no head multiplier": replace(FUSED, named="head multiplier = .* is missing", wrong=["head"]),
    "folded, and in the forward": replace(
        FUSED, named="multipliers: (.|\n)*applied twice|another plan's", folded=True, forward="plain"
    ),
    "multipliers in neither": replace(FUSED, named="multiplier = .* is missing", forward="folded"),
    "folded, with the plain start": replace(FUSED, named="init: blocks.0.o.weight", folded=True, init="plain"),
    "tied": replace(FUSED, named="head is its embedding", after=lambda m: setattr(m.out, "weight", m.tok.weight)),
    "router frozen": replace(FUSED, named="coverage: .*router", after=frozen("router")),
    "router detached": replace(FUSED, named="moved: .*router(.|\n)*detached", wrong=["router detached"]),
    "twice the experts": replace(FUSED, named="experts 16, planned 8", wrong=["experts"]),
    "three active": replace(FUSED, named="2 experts per token(.|\n)*measured: 3", wrong=["active"]),
    "wide shared expert": replace(FUSED, named="shared13.*planned 24", wrong=["wide shared"]),
    "a layer more": replace(FUSED, named="layer 2, the plan has 2", wrong=["layers"]),
    "one expert by its own start": replace(FUSED, named=r"w2\[expert 1\]", after=drawn("blocks.1.moe.w2", 1)),
    "not renormalised": replace(FUSED, named="routed sum", wrong=["no renormalisation"]),
    "softmax": replace(FUSED, named="weights of softmax scores", wrong=["other scores"]),
    "torch's attention scale": replace(FUSED, named="the planned scale was not passed on", wrong=["attention scale"]),
    "half the heads": replace(FUSED, named="4 heads of 8(.|\n)*measured: 2 heads", wrong=["heads"]),
    "embedding times the root": replace(FUSED, named="embedding on its way", wrong=["embedding times root"]),
    "no final norm": replace(FUSED, named="norm.weight(.|\n)*forward pass uses it", wrong=["no final norm"]),
    "shared expert dropped": replace(FUSED, named="shared13(.|\n)*result is dropped", wrong=["no shared"]),
    "router before the norm": replace(FUSED, named="the stream, before the norm", wrong=["router reads stream"]),
    "temperature on the router": replace(FUSED, named="temperature", wrong=["temperature"]),
    "gates in another order": replace(FUSED, named="in another order", wrong=["gates in another order"]),
    **training("fused", False),
}
LISTS = Slip("lists", "", folded=True)
LISTS_SLIPS = {
    "experts as dense": replace(
        LISTS,
        named="ffn_up, which the plan does not have",
        rows={
            "fc": Row("h.*.experts.*.fc.weight", "ffn_up", OUT_IN),
            "proj": Row("h.*.experts.*.proj.weight", "ffn_down", OUT_IN),
        },
    ),
    "o as v": replace(LISTS, named="role attention_o", rows={"o": Row("h.*.o.weight", "attention_v", OUT_IN)}),
    "square proj transposed": replace(
        LISTS,
        named="experts.0.proj(.|\n)*declared as in",
        rows={"proj": Row("h.*.experts.*.proj.weight", "expert_down", IN_OUT)},
    ),
    "final norm as norm": replace(
        LISTS, named="final_norm: give it", rows={"ln_f": Row("ln_f.weight", "norm", VECTOR)}
    ),
    "trained router bias as router_bias": replace(
        LISTS, named="coverage: h.0.router.bias", rows={"bias router": Row("h.*.router.bias", "router_bias", VECTOR)}
    ),
    "head bias as norm": replace(
        LISTS, named="lm_head.bias(.|\n)*uses it as a bias", rows={"bias lm_head": Row("lm_head.bias", "norm", VECTOR)}
    ),
    "norm biases as norm": replace(
        LISTS, named="h.0.ln1.bias(.|\n)*uses it as a bias", rows={"bias ln": Row("h.*.ln*.bias", "norm", VECTOR)}
    ),
    "gains as bias": replace(
        LISTS,
        named="h.0.ln1.weight(.|\n)*uses it as a gain",
        rows={"ln": Row("h.*.ln*.weight", "bias", VECTOR)},
        folded=False,
    ),
    "gains as bias, folded": replace(
        LISTS, named="a gain has the role norm", rows={"ln": Row("h.*.ln*.weight", "bias", VECTOR)}
    ),
    "one expert by name": replace(
        LISTS,
        named="experts.1.fc.weight .* has no role",
        rows={"fc": Row("h.*.experts.0.fc.weight", "expert_up", OUT_IN)},
    ),
    "no R": replace(LISTS, named="route scale R = 2 is missing", wrong=["route"], folded=False),
    "no head multiplier, (logits, loss)": replace(
        LISTS, named="head multiplier = .* is missing", wrong=["head"], folded=False
    ),
    "no head multiplier, loss alone": replace(
        LISTS, named="head multiplier = .* is missing", wrong=["head"], folded=False, only_loss=True
    ),
    "folded, and in the forward": replace(LISTS, named="multipliers: attention branch", forward="plain"),
    "one expert module four times": replace(LISTS, named="1 tensors of role expert_up", wrong=["one expert"]),
    "three active": replace(LISTS, named="measured: 3", shape=lambda s: replace(s, active=3)),
    "eight experts": replace(LISTS, named="experts 8, planned 4", shape=lambda s: replace(s, experts=8)),
    "not renormalised": replace(LISTS, named="routed sum", wrong=["softmax over chosen of all"]),
    "a norm left out": replace(LISTS, named="h.0.ln2.weight(.|\n)*forward pass uses it", wrong=["pre-norm left out"]),
    "loss summed": replace(LISTS, named="summed over tokens", wrong=["sum"]),
    "biases drawn": replace(
        LISTS,
        named="init: h.0.q.bias",
        after=lambda m: [nn.init.normal_(x.bias, 0, 0.02) for x in m.modules() if isinstance(x, nn.Linear)] and None,
    ),
    "one expert by its own start": replace(
        LISTS, named="init: h.1.experts.1.proj.weight", after=drawn("h.1.experts.1.proj.weight")
    ),
    "router bias frozen": replace(LISTS, named="coverage: h.0.router.bias", after=frozen("router.bias")),
    **training("lists", True),
}
TIED = Slip("tied", "")
TIED_SLIPS = {
    "experts' down as up": replace(
        TIED, named="expert_down", rows={"down": Row("layers.*.mlp.down", "expert_up", STACK_T)}
    ),
    "final norm as norm": replace(
        TIED, named="final_norm: give it", rows={"final": Row("final.weight", "norm", VECTOR)}
    ),
    "positions as embedding": replace(
        TIED, named="role position", rows={"wpe": Row("wpe.weight", "embedding", IN_OUT)}
    ),
    "square up transposed": replace(
        TIED, named="mlp.up(.|\n)*declared as in", rows={"up": Row("layers.*.mlp.up", "expert_up", STACK)}
    ),
    "untied without a row": replace(TIED, named="head.weight .* has no role", wrong=["untied"]),
    "untied": replace(TIED, named="model's head is a tensor of its own", wrong=["untied", "untied row"]),
    "no head multiplier": replace(TIED, named="head multiplier = .* is missing", wrong=["head"]),
    "logits over the root": replace(TIED, named="logits of wte.weight", wrong=["logits over root"]),
    "R twice": replace(TIED, named="route scale R = 2 is applied twice", wrong=["route squared"]),
    "A of the first layer": replace(TIED, named="routed sum of layers.1", wrong=["A of the first layer"]),
    "A on attention too": replace(TIED, named="attention branch of layers.1.o", wrong=["A on attention too"]),
    "halved sum": replace(TIED, named="attention branch of layers.0.o.*layers.1.o", wrong=["halved sum"]),
    "residual multiplier on the stream": replace(TIED, named="multipliers: ", wrong=["residual on stream"]),
    "attention scale twice": replace(TIED, named="it is applied twice", wrong=["attention scale twice"]),
    "positions times the root": replace(TIED, named="of wpe.weight(.|\n)*multiplier 1", wrong=["positions times root"]),
    "no positions": replace(TIED, named="wpe.weight(.|\n)*forward pass uses it", wrong=["no positions"]),
    "positions at zero": replace(TIED, named="init: wpe.weight", after=drawn("wpe.weight", std=0.0)),
    "positions frozen": replace(TIED, named="coverage: wpe.weight", after=frozen("wpe")),
    "router frozen": replace(TIED, named="coverage: layers.1.mlp.gate", after=frozen("mlp.gate")),
    "three active": replace(
        TIED, named="measured: 3", shape=lambda s: replace(s, blocks=(s.blocks[0], replace(s.blocks[1], active=3)))
    ),
    **training("tied", False),
}
SLIPS = {
    f"{slip.kind}: {name}": slip for table in (FUSED_SLIPS, LISTS_SLIPS, TIED_SLIPS) for name, slip in table.items()
}
