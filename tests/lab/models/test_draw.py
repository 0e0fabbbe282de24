"""Drawing: an image is a function of its class, its seed and the way it is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mue
from mue.lab.models.draw import draw, noise_of
from mue.lab.models.flow import guided
from mue.lab.models.sampling import Sampling
from support.diffusion import IMAGE, batch_of, model_of, plan_of


def test_an_image_does_not_depend_on_what_is_drawn_beside_it() -> None:
    model = model_of(plan_of(), awake=0.3).eval()
    together = draw(model, [0, 1, 2, 0], [5, 5, 6, 7], Sampling(steps=4))
    alone = [draw(model, [c], [seed], Sampling(steps=4))[0] for c, seed in ((0, 5), (1, 5), (2, 6), (0, 7))]
    assert together.dtype == np.uint8 and together.shape == (4, 1, 8, 8)
    # to a shade: products of another number of rows are rounded otherwise
    assert np.abs(together.astype(int) - np.stack(alone)).max() <= 1
    # The controls: another class, another seed.
    assert (
        np.abs(together[0].astype(int) - together[1]).max() > 5
        and np.abs(together[0].astype(int) - together[3]).max() > 5
    )


BY_PLACE = "draws them by the token's place in the batch: take another router"


@pytest.mark.parametrize(
    ("router", "settings", "says"),
    [
        ("expert-choice", {"evaluation": "batch"}, 'say within = "sequence", or evaluation = "threshold"'),
        ("expert-choice", {"evaluation": "batch", "within": "sequence"}, ""),
        ("expert-choice", {}, ""),
        ("switch", {"evaluation_capacity": 1.0}, "evaluation_capacity of switch drops tokens.*leave it at 0"),
        ("switch", {}, ""),
        ("random", {}, BY_PLACE),
        ("thor", {}, BY_PLACE),
    ],
)
def test_a_router_that_looks_at_the_batch_draws_nothing(router: str, settings: dict[str, object], says: str) -> None:
    """What is refused does depend on its batch, and what is not does not."""
    notation = "4e1a" if router == "thor" else "8e2a"
    target = mue.MoE.parse(
        notation, width=32, expert=16, layers=2, head_dim=16, image=IMAGE, router=router, router_settings=settings
    )
    model, (x, t, c, _) = model_of(plan_of(target), awake=0.3).double().eval(), batch_of(dtype=torch.float64)
    apart = torch.cat([model(x[i : i + 1], t[i : i + 1], c[i : i + 1]).logits for i in range(len(x))])
    assert torch.allclose(model(x, t, c).logits, apart, rtol=0, atol=1e-12) == (not says)
    model = model.float()
    if not says:
        assert len(draw(model, [0], [0], Sampling(steps=1))) == 1
        return
    with pytest.raises(ValueError, match=f"would depend on what is drawn beside it: .*{says}"):
        draw(model, [0], [0], Sampling(steps=1))


def test_one_step_of_euler_by_hand() -> None:
    model = model_of(plan_of(), awake=0.3).eval()
    noise, label = noise_of(model, 3)[None], torch.tensor([1])
    with torch.no_grad():
        image = noise - guided(model, label, 2.0)(noise, torch.ones(1))
    found = draw(model, [1], [3], Sampling(guidance=2.0, steps=1, sampler="euler"))
    assert (found == ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()).all()


def test_a_model_that_diverged_draws_nothing() -> None:
    model = model_of(plan_of()).eval()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="its run diverged"):
        draw(model, [0], [0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guidance": -1}, "guidance must be at least 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"sampler": "huen"}, "did you mean 'heun'"),
    ],
)
def test_ways_that_are_none(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampling(**options)  # type: ignore[arg-type]
