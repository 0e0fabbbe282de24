"""The page that teaches a transfer: from the values tuned on a base, by a rule, to those of every role of a target.

    value of a role on the target = value tuned on the base × factor(ratios of target to base)

The factors are a rule's table (:mod:`mue.rules`), the ratios follow from two shapes and two runs (:mod:`mue.plan.ratios`), and
what the base's value of a role is, where it has its own or the base has habits, is :mod:`mue.plan.per_role`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mue.plan import blocks as block_plans
from mue.plan import per_role
from mue.plan.convention import Convention
from mue.plan.notes import notes
from mue.plan.plan import Inputs, PlanData
from mue.plan.ratios import refuse
from mue.plan.values import BlockPlan, Values
from mue.rules import get_rule
from mue.rules.optimizers import for_optimizer
from mue.rules.options import plain
from mue.shapes import Block, HParams, Training, Transformer


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
    duration_exponent: Fraction | float | str | None = None,
    weight_decay_width: str | None = None,
    head: str | None = None,
    betas: str | None = None,
    up_gate_correction: bool | None = None,
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
        duration_exponent: q of rates × ρ_D^-q, 1/2 by default; another value loses two invariants, and says so.
        weight_decay_width: ``"constant-product"`` (default), ``"sqrt-width"`` or ``"none"``.
        head: ``"completep"`` (default) or ``"paper"``. betas: ``"linear"`` (default) or ``"power"``.
        up_gate_correction: experimental correction of the up/gate drift, off by default.

    Raises:
        ValueError: naming the number and the fix, for anything the rule cannot answer, and for an option it lacks.

    Source: Complete-muE (arXiv 2605.23893) for the default rule; each row of a plan names its own.
    """
    options = {
        "depth_exponent": depth_exponent,
        "duration_exponent": duration_exponent,
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
            options={name: value for name, value in options.items() if value is not None},
        )
    )


def plan_of(inputs: Inputs) -> PlanData:
    """The plan that follows from its inputs; see :func:`transfer`."""
    target, convention = inputs.target, inputs.convention

    # 1. Where the transfer starts: a shape with the values tuned on it, or a plan whose target is the base of this one.
    start = _from_plan(inputs, inputs.base) if isinstance(inputs.base, PlanData) else _from_shape(inputs, inputs.base)
    per_role.check_roles(start.tuned, start.shape)
    convention.check_optimizer(start.tuned.optimizer)

    # 2. The rule: a published table, with its options, read for the optimizer that the values were tuned with.
    rule = for_optimizer(get_rule(inputs.rule, **inputs.options), start.tuned.optimizer)

    # 3. What changes: the ratios that the table may read. All blocks share those of width, depth, batch and duration.
    change = block_plans.Change(start.shape, target, start.training, inputs.training or start.training)
    shared = change.ratios(target.blocks[0])
    refuse(rule, start.shape, target, shared)  # rather no plan than one by a rule that has no answer

    # 4. Every role of every kind of block: the base's value × the table's factor; A and R of its feed-forward branch
    #    (transfer-rules 1.3: A·R is what an active expert's output is multiplied by; why down's init follows is there too).
    def planned(block: Block, third: str) -> BlockPlan:
        return block_plans.block_plan(
            rule,
            change,
            block,
            start.output,
            lambda role: start.values(role, third, convention),
            lambda role: per_role.describe(start.tuned, role, third),
        )

    blocks = tuple(planned(block, third) for block, third in per_role.split_by_third(target, start.tuned))
    block_plans.check_output_multiplier(target, blocks)

    # 5. The rest of the forward pass and of Adam: residual branches × l^-α (CompleteP), logits × 1/r, the softmax's scale by
    #    head size, and 1-β by the change of steps.
    return PlanData(
        inputs=_with_resolved_options(inputs, plain(rule.options)),
        rule=rule,
        tuned=start.tuned,
        target=target,
        training=change.training,
        blocks=blocks,
        roles=block_plans.merge(blocks),
        residual_multiplier=start.residual * rule.residual_multiplier(shared),
        head_multiplier=start.head * rule.head_multiplier(shared),
        attention_scale=start.scale * (start.shape.head_dim / target.head_dim) ** float(rule.attention_exponent),
        betas=block_plans.carried_betas(start.betas, rule, change, shared),
        notes=notes(rule, start.shape, target, start.tuned, planned_base=start.plan is not None),
    )


def _with_resolved_options(inputs: Inputs, options: dict[str, str | bool]) -> Inputs:
    """The inputs with every option written out, so that a stored plan keeps its meaning when a default changes."""
    return Inputs(**{**vars(inputs), "options": options})


@dataclass(frozen=True)
class _Start:
    """What a transfer starts from, whether a shape or a plan.

    ``scale``, ``output``, ``residual`` and ``head`` are the base's own forward multipliers (1 on a stock model), which
    compose with the rule's like every other factor.
    """

    shape: Transformer
    training: Training | None
    tuned: HParams
    plan: PlanData | None
    scale: float
    output: float
    residual: float
    head: float
    betas: tuple[float, float]

    def values(self, role: str, third: str, convention: Convention) -> Values:
        """The base's values of a role, in a third of the depth that has its own (or "")."""
        if self.plan is not None:
            return per_role.planned_values(self.plan, role, third)
        return per_role.base_values(role, self.shape, self.tuned, convention, third)


def _from_plan(inputs: Inputs, base: PlanData) -> _Start:
    if inputs.tuned is not None or inputs.convention != Convention() or inputs.base_training is not None:
        raise ValueError("a base that is a plan brings its own tuned values, training and convention: leave them out")
    if inputs.training is not None and base.training is None:
        raise ValueError(
            "training is given, but the base plan has none: plan the base with both trainings, or leave this one out"
        )
    if base.folding is not None:
        raise ValueError("the base plan is folded: transfer from mue.fold.unfold(plan), and fold the result")
    if base.output_multiplier is None:
        raise ValueError("the base plan's blocks differ: there is no single e* to transfer from")
    return _Start(
        base.target,
        base.training,
        base.tuned,
        base,
        base.attention_scale,
        base.output_multiplier,
        base.residual_multiplier,
        base.head_multiplier,
        base.betas,
    )


def _from_shape(inputs: Inputs, base: Transformer) -> _Start:
    tuned, before, training = inputs.tuned, inputs.base_training, inputs.training
    if tuned is None:
        raise ValueError("tuned is missing: give mue.HParams(lr, weight_decay, init_std) found on the base")
    if (before is None) != (training is None):
        given, lacking = ("training", "base_training") if before is None else ("base_training", "training")
        raise ValueError(
            f"{given} is given without {lacking}: give both, or neither for no change of batch or duration"
        )
    scale = inputs.convention.scale(base.head_dim)
    return _Start(base, before, tuned, None, scale, base.output_multiplier, 1.0, 1.0, tuned.betas)
