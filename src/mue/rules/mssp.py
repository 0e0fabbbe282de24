"""MSSP (Vankadara, Haas, Hayward, Bordt, Breccia, arXiv 2605.14200): one table per regime of growing MoEs.

From the authors' code (vankadara-lab/mssp-moe, scaling.py), the Adam tables, in ratios with N = d, N_e = h, M experts and
K active. Weight decay there is the group's rate inverted, so that lr·wd is one number for all tensors and widths. Three
regimes, and their fixes must not be mixed:

    fixed-experts   N and N_e grow, M and K stay                the router starts at zero
    bottleneck      N, M, K grow, N_e stays (fine-grained)      expert down starts larger by √M
    all-scaling     N, N_e, M, K grow                           all experts start from one and the same draw

Experts are summed with K^-α, α = 0 in the first regime and 1 in the others, over sigmoid gates that are not renormalised. On
weights that sum to one the 1/K is in them already (and K stays in the first regime), so R = A = 1 here: inferred.
"""

from __future__ import annotations

from dataclasses import dataclass

from mue.rules.algebra import ONE, Monomial, ratio
from mue.rules.registry import RULES
from mue.rules.roles import of_kind
from mue.rules.table import AUTHORS_CODE, SHARED_INIT, ZERO, ZERO_INIT, Row, Rule

N, o, N_e, M = ratio("ρ_d"), ratio("ρ_o"), ratio("ρ_H"), ratio("ρ_N")
SOURCE = "2605.14200, mssp-moe/scaling.py"


@dataclass(frozen=True)
class _Regime:
    """What differs between the regimes: the expert side, and how experts start."""

    title: str
    router: Row
    eps_up: Monomial
    down: Row
    init: str
    refuses: dict[str, str]


def _row(name: str, std: Monomial, lr: Monomial, eps: Monomial, init: str = "normal") -> Row:
    # wd_group = wd / lr_scale in their code: lr·wd is one number for every tensor and width
    return Row(
        init_std=std, lr=lr, weight_decay=1 / lr, eps=eps, source=f"{SOURCE}: {name}", status=AUTHORS_CODE, init=init
    )


def _router(std: Monomial, eps: Monomial, init: str = "normal") -> Row:
    return _row("router", std, N**-1, eps, init)


def _rule(name: str, regime: _Regime) -> Rule:
    """The table of a regime; attention, embedding, norms and head are the same in all three."""
    up = _row("expert up", N ** "-1/2", N**-1, regime.eps_up, regime.init)
    attention = _row("attention", N ** "-1/2", N**-1, N**-1)
    constant = _row("embedding and norms: std and rate constant, eps 1/N", ONE, ONE, N**-1)
    return Rule(
        name=name,
        title=regime.title,
        source="arXiv 2605.14200; vankadara-lab/mssp-moe",
        rows={
            "embedding": constant,
            **dict.fromkeys(of_kind("attention"), attention),
            "attention_o": _row("attention, on its fan-in", o ** "-1/2", o**-1, o**-1),
            "expert_up": up,
            "expert_gate": up,
            "expert_down": regime.down,
            "router": regime.router,
            "router_bias": Row(source=f"{SOURCE}: no balance bias there; not an optimizer parameter"),
            "norm": constant,
            "qk_norm": constant,
            "final_norm": constant,
            "head": _row("head: 0 (or 1/N)", ZERO, N**-1, ONE, ZERO_INIT),
        },
        routed=False,
        refuses={
            "depth": "MSSP gives no depth rule",
            "dense to moe": "MSSP scales MoEs within one regime, not from a dense proxy (use complete-mue)",
            "gates": "MSSP in these plans needs weights that sum to one",
            "tied": "MSSP starts the head at zero and scales its rate, which a tied head cannot have",
            "batch": "MSSP gives no batch rule",
            "duration": "MSSP gives no duration rule",
            **regime.refuses,
        },
        unanswered=dict.fromkeys(
            of_kind("ffn"), "MSSP's tables are for experts; it has no row for a dense feed-forward"
        ),
        notes=("norms are not decayed here, whereas MSSP's code decays every tensor",),
    )


_SPARSITY = {"sparsity": "MSSP grows M and K together: a/N stays"}


@RULES.register("mssp-fixed-experts", place=9)
def mssp_fixed_experts() -> Rule:
    """Regime I: widths grow, experts stay."""
    return _rule(
        "mssp-fixed-experts",
        _Regime(
            "MSSP, fixed experts",
            router=_router(ZERO, ONE, ZERO_INIT),
            eps_up=N**-1,
            down=_row("expert down", N_e ** "-1/2", N_e**-1, N**-1),
            init="normal",
            refuses={
                "experts": "MSSP's regime of fixed experts keeps M (use mssp-bottleneck or mssp-all-scaling)",
                "active": "MSSP's regime of fixed experts keeps K (use mssp-bottleneck or mssp-all-scaling)",
            },
        ),
    )


@RULES.register("mssp-bottleneck", place=10)
def mssp_bottleneck() -> Rule:
    """Regime II: residual width and number of experts grow, the expert stays narrow."""
    return _rule(
        "mssp-bottleneck",
        _Regime(
            "MSSP, bottleneck",
            router=_router(N ** "-1/2", M**-1),
            eps_up=M**-1,
            down=_row("expert down, √(M/N_e): MSSP's √M", M ** "1/2" / N_e ** "1/2", N_e**-1, 1 / (N * M)),
            init="normal",
            refuses={
                **_SPARSITY,
                "expert width": "MSSP's bottleneck regime keeps the width of an expert (use mssp-all-scaling)",
            },
        ),
    )


@RULES.register("mssp-all-scaling", place=11)
def mssp_all_scaling() -> Rule:
    """Regime III: everything grows, and all experts of a layer share their first weights."""
    return _rule(
        "mssp-all-scaling",
        _Regime(
            "MSSP, all scaling",
            router=_router(N ** "-1/2", M**-1),
            eps_up=1 / (N * M),
            down=_row("expert down, shared init", N_e ** "-1/2", N_e**-1, 1 / (N * M), SHARED_INIT),
            init=SHARED_INIT,
            refuses=_SPARSITY,
        ),
    )
