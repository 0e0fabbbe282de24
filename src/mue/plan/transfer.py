"""The page that teaches a transfer: from the values tuned on a base, by a rule, to those of every role of a target.

    value of a role on the target = value tuned on the base × factor(ratios of target to base)

:func:`plan_of` goes from one to the other, top to bottom. What each step needs lies beside it: the base (:mod:`mue.plan.base`),
the rule's table (:mod:`mue.rules`), the ratios (:mod:`mue.plan.ratios`), one block (:mod:`mue.plan.blocks`). Why each
factor is what it is: docs/why/index.md.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from fractions import Fraction

from mue.plan.base import base_of
from mue.plan.blocks import Transition, block_plan, carried_betas, check_output_multiplier, merge
from mue.plan.convention import Convention
from mue.plan.defaults import differing
from mue.plan.gates import refuse_batch, with_logit_std
from mue.plan.notes import (
    batch_notes,
    betas_notes,
    critical_batch_notes,
    far_batch_notes,
    notes,
    warmup_notes,
)
from mue.plan.per_role import split_by_third
from mue.plan.plan import Inputs, PlanData
from mue.plan.ratios import refuse
from mue.rules import OPTIONS, get_rule
from mue.rules.optimizers import for_optimizer
from mue.rules.options import as_json
from mue.rules.roles import roles_of
from mue.shapes import HParams, Training, Transformer
from mue.util.errors import CallError, explain_calls, nearest


@explain_calls
def transfer(
    base: Transformer | PlanData,
    target: Transformer,
    tuned: HParams | None = None,
    *,
    base_training: Training | None = None,
    training: Training | None = None,
    rule: str = "complete-mue",
    convention: Convention | None = None,
    depth_exponent: Fraction | float | str | None = None,
    batch_exponent: Fraction | float | str | None = None,
    duration_exponent: Fraction | float | str | None = None,
    weight_decay_run: str | None = None,
    eps_run: str | None = None,
    weight_decay_width: str | None = None,
    head: str | None = None,
    betas: str | None = None,
    up_gate_correction: bool | None = None,
    **more: object,
) -> PlanData:
    """The target's hyperparameters, from the values tuned on the base.

    Args:
        base: the shape that was tuned, or another plan (its values then take the place of ``tuned``).
        target: the shape to train. Its own ``output_multiplier`` is decided here.
        tuned: the base's values; peak lr, torch's decoupled weight decay unless ``convention`` says otherwise.
        base_training, training: the tuned run and the planned one: both, or neither for no batch or duration change.
        rule: a name from :data:`mue.rules.RULES`.
        convention: the base's habits.
        depth_exponent: CompleteP's α in [1/2, 1], 1 by default.
        batch_exponent, duration_exponent: p and q of s = ρ_B^p · ρ_D^-q, the run's factor on rates; by default 7/20 and 0 in
            ``complete-mue``, as measured (docs/findings/horizon.md), and 1/2 in rules that publish the SDE rule. With other
            values than 1/2 not everything that the SDE rule keeps can be kept; the plan's notes say what is given up.
            ``**mue.rules.SDE`` gives the SDE rule as a whole.
        weight_decay_run: ``"follows-lr"`` (× s), ``"constant-timescale"`` (keeps η·λ·T) or ``"unchanged"`` (``complete-mue``).
        eps_run: ``"follows-lr"`` (default: × 1/s) or ``"unchanged"``.
        weight_decay_width: ``"constant-product"`` (default), ``"sqrt-width"`` or ``"none"``.
        head: ``"completep"`` (default) or ``"paper"``.
        betas: ``"linear"`` (1-β × s²), ``"power"``, ``"constant-timescale"`` (keeps (1-β)·T) or ``"unchanged"`` (``complete-mue``).
        up_gate_correction: experimental correction of the up/gate drift, off by default.
        more: options that came with a rule of their own, by name (:data:`mue.rules.OPTIONS`).

    Returns:
        The plan: absolute values of every role and the forward multipliers, as numbers
        (docs/glossary.md#the-fields-of-a-plan).

    Raises:
        ValueError: naming the number and the fix, for anything the rule cannot answer, and for an option it lacks.
        CallError: a keyword that is no option of any rule; it is a TypeError and a ValueError.

    Source: Complete-muE (arXiv 2605.23893) for the default rule; each row of a plan names its own.
    """
    for name in more:
        if name not in OPTIONS:
            raise CallError(
                f"transfer() got an unexpected keyword argument {name!r}{nearest(name, dict.fromkeys((*_KEYWORDS, *OPTIONS)))}"
            )
    _check_kinds(base, target, tuned, base_training, training)
    options = more | {
        "depth_exponent": depth_exponent,
        "batch_exponent": batch_exponent,
        "duration_exponent": duration_exponent,
        "weight_decay_run": weight_decay_run,
        "eps_run": eps_run,
        "weight_decay_width": weight_decay_width,
        "head": head,
        "betas": betas,
        "up_gate_correction": up_gate_correction,
    }
    return plan_of(
        Inputs(
            base=base,
            target=target,
            tuned=tuned,
            base_training=base_training,
            training=training,
            rule=rule,
            convention=convention or Convention(),
            # what is not given is the rule's own default, and a rule without the option is not asked for it
            options={name: value for name, value in options.items() if value is not None},
        )
    )


def _check_kinds(base: object, target: object, tuned: object, *runs: object) -> None:
    """Refuse what is no number of ours: a model, a dictionary."""
    for name, given in (("base", base), ("target", target)):
        if not isinstance(given, Transformer) and not (name == "base" and isinstance(given, PlanData)):
            raise ValueError(
                f"{name} is a {type(given).__name__}: a transfer goes by numbers, so give mue.Dense(width=..., ...) or mue.MoE.parse(...)"
                f"{', or a plan' if name == 'base' else ''} (mue inspect shows those of a model)"
            )
    if not isinstance(tuned, HParams | None):
        raise ValueError(f"tuned is a {type(tuned).__name__}: give mue.HParams(lr=..., weight_decay=..., init_std=...)")
    for run in runs:
        if not isinstance(run, Training | None):
            raise ValueError(f"a run is a {type(run).__name__}: give mue.Training(batch=tokens per step, steps=...)")


_KEYWORDS = tuple(name for name in inspect.signature(transfer).parameters if name != "more")


def plan_of(inputs: Inputs) -> PlanData:
    """The plan that follows from its inputs.

    Args:
        inputs: what :func:`transfer` is given, as one value; a plan file holds the same.

    Raises:
        ValueError: as :func:`transfer` does.
    """
    target = inputs.target

    # 1. Where the transfer starts: what was tuned, on which shape, in which run.
    base = base_of(inputs)

    # 2. The rule: a published table with its options (one file each in mue.rules), read for the optimizer that the values were
    #    tuned with. The tables are written for Adam; what SGD, Muon and others make of them is derived in mue.rules.optimizers.
    #    What a task adds to a transformer (the modulations of images) has rows by its class of weights, where a table has no own.
    rule = get_rule(inputs.rule, **inputs.options).for_roles(roles_of(target).values())
    rule = for_optimizer(rule, base.tuned.optimizer, base.tuned.muon_moves)

    # 3. What changes, as ratios of target to base, which are all that a table may read:
    #       r = ρ_d = d/d*    residual width: a matrix with more inputs starts smaller and moves less (µP, 2203.03466)
    #       l = ρ_L = L/L*    depth: more branches add up in the residual stream (CompleteP, 2505.01618)
    #       ρ_e = e/e*        active expansion: e = H_act/d, with H_act the hidden width that one token passes through
    #                         (H in a dense feed-forward, a·h + n_s·h_s with experts): what MoE and dense have in common
    #                         (Complete-muE, 2605.23893); N, the number of experts, enters nothing
    #       ρ_B, ρ_D          tokens of a step and of the run; rates take s = ρ_B^p · ρ_D^-q: p = 7/20 and q = 0 were measured
    #                         (docs/findings/horizon.md), p = q = 1/2 is the SDE rule, s = √(T*/T) (2605.23893, Table 2)
    #    Of these only ρ_e depends on the block. Rather no plan than one by a rule that has no answer to a change:
    # Without a run of its own the target trains as the base did: ρ_B = ρ_D = 1.
    transition = Transition(base.shape, target, base.training, inputs.training or base.training)
    ratios = transition.ratios(target.blocks[0])
    refuse(rule, base.shape, target, ratios)
    #    Where weights do not sum to one: how far apart the router's logits are at init (docs/why/index.md#gates).
    target = with_logit_std(
        target, lambda block, role: block_plan(rule, transition, base, block, "").roles[role].values.init_std
    )
    refuse_batch(target, transition.training)
    transition = replace(transition, target=target)

    # 4. Every role of every kind of block: the base's value × the table's factor; and A and R of its feed-forward branch. By
    #    complete-mue at α = 1, a down projection is drawn with σ*·r^-½·ρ_e^½, moves with η·r^-1·s and decays with λ·r, an
    #    expert's as a dense one's, and its branch is multiplied by A = A*/ρ_e and R = a (docs/why/index.md#experts).
    #    A third of the depth that has tuned values of its own makes a kind of block of its own.
    blocks = tuple(
        block_plan(rule, transition, base, block, third) for block, third in split_by_third(target, base.tuned)
    )
    check_output_multiplier(target, blocks)

    # 5. What holds for the whole model, in the forward pass and in Adam:
    #    the averages over gradients, as tuned (docs/findings/horizon.md) or, by the SDE rule, as long a part of the run as on
    #    the base: 1-β × T*/T (2605.23893, Table 2); the rule's option says which
    betas = carried_betas(base.betas, rule, transition, ratios)
    plan = PlanData(
        inputs=replace(inputs, options=as_json(rule.options)),  # all of them: a new default changes no stored plan
        rule=rule,
        tuned=base.tuned,
        target=target,
        training=transition.training,
        blocks=blocks,
        roles=merge(blocks),
        # l^-α on both branches of every block, so that a sum of l times as many moves as before (CompleteP Table 1)
        residual_multiplier=base.residual_multiplier * rule.residual_multiplier(ratios),
        # 1/r on the logits: a sum over r times as many features, whose updates are aligned (CompleteP Table 1)
        head_multiplier=base.head_multiplier * rule.head_multiplier(ratios),
        # q·k is a sum over d_head: trained queries and keys are aligned, so the scale falls as 1/d_head (µP, 2203.03466)
        attention_scale=base.attention_scale
        * (base.shape.head_dim / target.head_dim) ** float(rule.attention_exponent),
        betas=betas,
        notes=differing(inputs)
        + notes(rule, base.shape, target, base.tuned, ratios, planned_base=base.plan is not None)
        + far_batch_notes(rule, ratios, transition.training)
        + critical_batch_notes(base.training, target, transition.training)
        + batch_notes(("base", inputs.base_training, base.shape), ("target", inputs.training, target))
        + betas_notes(base.tuned.optimizer, (base.betas, base.training), (betas, transition.training))
        + warmup_notes(base.tuned, betas[1], transition.training),
    )
    if base.tuned.optimizer == "muon":
        _ = plan.momentum  # one that cannot be carried is refused here, and not by whoever asks for it first
    return plan
