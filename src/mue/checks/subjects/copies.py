"""Does the optimizer step the weights that the model has? Masters that were made before an init or a load bring old ones back."""

from __future__ import annotations

from collections.abc import Iterator

from mue.checks.context import Context
from mue.checks.probe import Probe, probed
from mue.checks.registry import check_of
from mue.checks.report import FAIL, PASS, Finding, several

NAME = "stale copies"


@check_of(NAME, place=11.5, needs=("roles", "plan", "values", "batch"))
@probed(NAME)
def copies(ctx: Context, found: list[Probe]) -> Iterator[Finding]:
    """A step without a gradient shrinks weights and does nothing else; where other numbers come, they were the optimizer's."""
    stale = [one for one in found if one.copied]
    if not stale:
        yield Finding(NAME, PASS, measured=f"{len(found)} tensors are stepped from the model's own weights")
        return
    one = stale[0]
    yield Finding(
        NAME,
        FAIL,
        several([p.info.name for p in stale]),
        "the first step starts from the model's weights",
        f"without a gradient {one.info.name} moves by {one.still:.3g} (its norm is {one.weight:.3g}), once",
        (
            "the optimizer made its float32 masters before plan.init_ or before a checkpoint was loaded: its first step throws that away",
            "the fused buffers that it steps are another model's",
        ),
        "build the optimizer after plan.init_ and load_state_dict, or refresh its masters (reload_model_params)",
    )
