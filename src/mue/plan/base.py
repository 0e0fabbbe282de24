"""Where a transfer starts: a shape with the values tuned on it, or a plan, whose target is then the base of the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mue.plan import per_role
from mue.plan.convention import Convention
from mue.plan.gates import with_logit_std
from mue.plan.plan import Inputs, PlanData
from mue.plan.values import Values
from mue.shapes import HParams, Training, Transformer


@dataclass(frozen=True)
class Base:
    """All that a transfer reads of its base, whichever of the two it is.

    The base's own forward multipliers compose with the rule's like every other factor. They are 1 on a stock model, except
    for the attention scale, which is a habit of the base.

    Attributes:
        shape: what was tuned. training: its run, or None where no run is spoken of.
        tuned: the values found there, of a plan those it started from; its texts and its unchanged values are taken from here.
        plan: the base as a plan, or None. convention: the habits of a base that is a shape.
        output_multiplier: A* of its feed-forward branches. residual_multiplier, head_multiplier, attention_scale, betas: its own.
    """

    shape: Transformer
    training: Training | None
    tuned: HParams
    plan: PlanData | None
    convention: Convention
    output_multiplier: float
    residual_multiplier: float
    head_multiplier: float
    attention_scale: float
    betas: tuple[float, float]

    def values(self, role: str, third: str) -> Values:
        """The values of a role, in a third of the depth that has its own (or ``""``).

        Raises:
            ValueError: a base plan that has no layer in that third.
        """
        if self.plan is not None:
            return per_role.planned_values(self.plan, role, third)
        return per_role.base_values(role, self.shape, self.tuned, self.convention, third)

    def own_values(self, role: str, third: str) -> str:
        """What was tuned for this role alone, as text, or ``""``."""
        return per_role.describe(self.tuned, role, third)


def base_of(inputs: Inputs) -> Base:
    """The base that a plan's inputs name.

    Raises:
        ValueError: inputs that are missing beside a shape or stand beside a plan that brings them; a plan that no transfer can
            start from; values for a role or a third that the base does not have.
    """
    made = _of_plan(inputs, inputs.base) if isinstance(inputs.base, PlanData) else _of_shape(inputs, inputs.base)
    per_role.check_roles(made.tuned, made.shape)
    made.convention.check_optimizer(made.tuned.optimizer)
    return replace(made, shape=with_logit_std(made.shape, lambda _, role: made.values(role, "").init_std))


def _of_plan(inputs: Inputs, plan: PlanData) -> Base:
    """A plan as base: the next factors start from its multipliers, scale and betas, so that plans compose."""
    if inputs.tuned is not None or inputs.convention != Convention() or inputs.base_training is not None:
        raise ValueError("a base that is a plan brings its own tuned values, training and convention: leave them out")
    if inputs.training is not None and plan.training is None:
        raise ValueError(
            "training is given, but the base plan has none: plan the base with both trainings, or leave this one out"
        )
    if plan.folding is not None:
        # Folded values have c in them, which belongs to that plan's A and R: no factor of a table takes it out again.
        raise ValueError("the base plan is folded: transfer from mue.fold.unfold(plan), and fold the result")
    if plan.output_multiplier is None:
        raise ValueError("the base plan's blocks differ: there is no single e* to transfer from")
    return Base(
        shape=plan.target,
        training=plan.training,
        tuned=plan.tuned,
        plan=plan,
        convention=inputs.convention,
        output_multiplier=plan.output_multiplier,
        residual_multiplier=plan.residual_multiplier,
        head_multiplier=plan.head_multiplier,
        attention_scale=plan.attention_scale,
        betas=plan.betas,
    )


def _of_shape(inputs: Inputs, shape: Transformer) -> Base:
    """A shape as base: a stock model but for its A* and its attention scale, which are declared."""
    tuned, before, after = inputs.tuned, inputs.base_training, inputs.training
    if tuned is None:
        raise ValueError("tuned is missing: give mue.HParams(lr, weight_decay, init_std) found on the base")
    # Both runs or neither: a ratio of one number is a guess.
    if (before is None) != (after is None):
        given, lacking = ("training", "base_training") if before is None else ("base_training", "training")
        raise ValueError(
            f"{given} is given without {lacking}: give both, or neither for no change of batch or duration"
        )
    return Base(
        shape=shape,
        training=before,
        tuned=tuned,
        plan=None,
        convention=inputs.convention,
        output_multiplier=shape.output_multiplier,
        residual_multiplier=1.0,
        head_multiplier=1.0,
        attention_scale=inputs.convention.scale(shape.head_dim),
        betas=tuned.betas,
    )
