"""The diffusion task: what it draws, what it refuses, that it trains, goes on exactly and keeps averages of its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mue
from mue.lab.data.images.scale import numbers
from mue.lab.tasks.diffusion import TIME_BINS, DiffusionTask, bin_times
from mue.lab.train.averages import Averages, ema_file
from mue.lab.train.run import TASK_FILE, WEIGHTS_FILE, Run, Settings, Store
from mue.lab.train.session import TrainingSession, train
from support.diffusion import BASE, IMAGE, MOE, images, model_of, plan_of, run_of
from support.small_run import Stop, stop_at

CORPUS = images()
TASK = DiffusionTask()


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    batches, again, other = (TASK.batches(run_of(CORPUS, seed=seed), CORPUS) for seed in (0, 0, 1))
    again.at(5)
    for one, two, three in zip(batches.at(3), again.at(3), other.at(3), strict=True):
        assert torch.equal(one, two) and not torch.equal(one, three)
    assert batches.tokens_per_step == 8 * 16 and batches.at(3)[0].shape == (8, 1, 8, 8)


def test_an_epoch_has_every_image_once() -> None:
    """x_0 = x_t − t·v is an image of the set, and 60 of 8 a step are each of them once, in another order in the next epoch."""
    batches, seen = TASK.batches(run_of(CORPUS), CORPUS), list[int]()
    known = numbers(CORPUS.train).flatten(1).double()
    for step in range(15):
        x, t, _, v = batches.at(step)
        distance = torch.cdist((x - t[:, None, None, None] * v).flatten(1).double(), known)
        assert distance.min(1).values.max() < 1e-4  # rounding of float32
        seen += distance.argmin(1).tolist()
    assert sorted(seen[:60]) == sorted(seen[60:]) == list(range(60)) and seen[:60] != seen[60:]


def test_times_and_labels_are_drawn_as_said() -> None:
    """logit-normal times; one label in ten is left out; the rest is the image's own."""
    batches = TASK.batches(run_of(CORPUS), CORPUS)
    drawn = [batches.at(step) for step in range(300)]
    time, label = (torch.cat([batch[i] for batch in drawn]) for i in (1, 2))
    logit = time.double().logit()
    assert abs(logit.mean()) < 0.08 and abs(logit.std() - 1) < 0.06  # 2400 draws: four standard errors
    assert 0.075 < (label == IMAGE.classes).float().mean() < 0.125
    noise = torch.cat([x + (1 - t)[:, None, None, None] * v for x, t, _, v in drawn])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_a_validation_pairs_images_and_noise() -> None:
    """The same images with the same noise at every time and for every run, and times whose mean loss estimates the training's."""
    first, other = (TASK.batches(run_of(CORPUS, seed=seed), CORPUS).validation() for seed in (0, 7))
    assert len(first) == TIME_BINS and [b[1][0].item() for b in first] == pytest.approx(bin_times())
    for one, two in zip(first, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert torch.equal(one[3], first[0][3]) and torch.equal(one[2], first[0][2])
    middles = torch.tensor(bin_times(4)).double().logit() / 2**0.5
    assert torch.allclose((1 + torch.erf(middles)) / 2, torch.tensor([0.125, 0.375, 0.625, 0.875]).double(), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (replace(BASE, image=None, sequence=16), "needs a shape that draws images"),
        (replace(BASE, image=replace(IMAGE, classes=4)), "the data have classes 3, the model's image classes 4"),
        (replace(BASE, image=mue.Image(16, 1, 4, 3)), "size 8, the model's image size 16"),
    ],
)
def test_images_that_are_not_the_models(shape: mue.Dense, message: str) -> None:
    training = mue.Training(128, 4)
    plan = mue.transfer(shape, shape, mue.HParams(0.01, 0.1, 0.1), base_training=training, training=training)
    with pytest.raises(ValueError, match=message):
        TASK.batches(Run(plan, Settings(task="diffusion"), CORPUS.describe()), CORPUS)


def test_what_is_watched_is_drawn_or_says_why_not() -> None:
    model = model_of(plan_of()).eval()
    drawn = TASK.watch(model)["drawn"]
    assert drawn["shape"] == [3, 1, 8, 8] and drawn["way"] == {"guidance": 1.5, "steps": 12, "sampler": "heun"}
    batched = replace(MOE, shared_experts=0, router="expert-choice", router_settings={"evaluation": "batch"})
    assert "what is drawn beside it" in TASK.watch(model_of(plan_of(batched)).eval())["not_drawn"]
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    assert TASK.watch(model).keys() == {"not_drawn"} and "diverged" in TASK.watch(model)["not_drawn"]


def test_it_learns_more_than_the_mean(tmp_path: Path) -> None:
    """Below the loss of predicting −E[x_0]: 1 + Var(x_0), which noise alone does not come below."""
    known = numbers(CORPUS.train)
    guess = 1 + (known - known.mean(0)).square().mean().item()
    result = train(run_of(CORPUS, BASE, steps=60), Store(tmp_path), CORPUS)
    assert result["status"] == "finished" and result["val_loss"] < 0.8 * guess < TASK.baseline_loss(BASE)


def test_a_run_broken_off_goes_on_exactly_with_its_averages(tmp_path: Path) -> None:
    """Weights, averages and metrics are the same to the last bit; an average is none of the weights."""
    run, folders = (
        run_of(CORPUS, ema=[0.5, 0.9], eval_every=10),
        [Store(tmp_path / name) for name in ("whole", "broken")],
    )
    result = train(run, folders[0], CORPUS, keep_weights=True)
    with pytest.raises(Stop):
        train(run, folders[1], CORPUS, checkpoint_seconds=0, progress=stop_at(11))
    train(run, folders[1], CORPUS, keep_weights=True)
    whole, broken = (store.folder(run.key) for store in folders)
    for name in (WEIGHTS_FILE, ema_file(0.5), ema_file(0.9), TASK_FILE):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert (whole / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    weights, average = (load_file(whole / name) for name in (WEIGHTS_FILE, ema_file(0.9)))
    assert weights.keys() == average.keys()
    assert not torch.equal(weights["head.weight"], average["head.weight"])
    assert set(result["ema_val_loss"]) == {"0.5", "0.9"} and result["ema_val_loss"]["0.9"] != result["val_loss"]


def test_averages_of_decays_alike_to_six_digits_are_files_of_their_own(tmp_path: Path) -> None:
    run, store = run_of(CORPUS, ema=[0.9999999, 0.99999991, 0.9], steps=2), Store(tmp_path)
    result = train(run, store, CORPUS, keep_weights=True)
    found = {path.name for path in store.folder(run.key).glob("ema-*")}
    assert found == {f"ema-{decay}.safetensors" for decay in ("0.9", "0.9999999", "0.99999991")}
    assert set(result["ema_val_loss"]) == {"0.9", "0.9999999", "0.99999991"}
    with TrainingSession(run, tmp_path, CORPUS) as session:
        assert len(session.averages.tensors()) == 3 * len(session.averages.parameters)


def test_averages_leave_other_runs_alone() -> None:
    """No decay: the key of before; another decay is another run."""
    plain, own = run_of(CORPUS), run_of(CORPUS, ema=[0.9])
    assert "ema" not in plain.settings.to_dict() and plain.key == run_of(CORPUS, ema=[]).key != own.key
    assert Run.from_dict(own.to_dict()).key == own.key
    with pytest.raises(ValueError, match="ema"):
        Settings(ema=(1.0,))
    with pytest.raises(ValueError, match="list of decays"):
        Settings(ema=0.9)  # type: ignore[arg-type]


def test_an_average_by_hand() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    averages, expected = Averages(model, [0.9, 0.2]), {0.9: 0.0, 0.2: 0.0}
    for step in range(1, 40):
        torch.nn.init.constant_(model.weight, step)
        averages.update_(step)
        for decay in expected:
            expected[decay] += (1 - min(decay, (1 + step) / (10 + step))) * (step - expected[decay])
    for decay, value in expected.items():
        with averages.in_place(decay):
            assert model.weight.item() == pytest.approx(value, rel=1e-5)
    assert model.weight.item() == 39


def test_gates_of_images_are_not_measured_on_text(tmp_path: Path) -> None:
    from mue.cli.measured_gates import write_measured_gates

    file = tmp_path / "images.toml"
    file.write_text(
        'data = {source = "digits"}\ntarget = {image = {size = 8, channels = 1, patch = 2, classes = 10}}\n'
    )
    with pytest.raises(ValueError, match="measures on text"):
        write_measured_gates(file, None)
