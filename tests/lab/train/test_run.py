"""Runs as data: their keys, their way to JSON and back, what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import mue
from mue.lab.data import Corpus
from mue.lab.data.spec import describe_data
from mue.lab.train.run import Run, Settings, Store
from mue.shapes import ROUTERS
from support.small_run import BASE, SETTINGS, TARGET, TUNED, moe_run


def test_runs_are_keyed_by_effective_values(corpus: Corpus) -> None:
    """Rules that agree share runs; what changes a number changes the key; what does not, does not."""
    data = describe_data({"source": []}, corpus)
    training = mue.Training(128, 10)

    def key(rule: str = "complete-mue", target: mue.Dense | mue.MoE = BASE, **changes: float) -> str:
        plan = mue.transfer(
            BASE, target, TUNED.replace(**changes), base_training=training, training=training, rule=rule
        )
        return Run(plan, SETTINGS, data).key

    assert key("standard") == key("complete-mue") == key("complete-mue-paper")  # at the base every rule is the identity
    assert key("standard", TARGET) != key("complete-mue", TARGET)
    assert key(lr=0.02) != key()
    assert key(bias_speed=0.5) == key()  # a dense model has no balance bias
    assert key(target=TARGET, bias_speed=0.5) != key(target=TARGET)


def test_run_round_trip(corpus: Corpus) -> None:
    run = moe_run(corpus)
    again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again.key == run.key
    assert again.plan == run.plan


def test_a_batch_must_hold_whole_sequences(corpus: Corpus) -> None:
    training = mue.Training(100, 10)
    plan = mue.transfer(BASE, TARGET, TUNED, base_training=training, training=training)
    with pytest.raises(ValueError, match="whole number of sequences"):
        Run(plan, SETTINGS, describe_data({"source": []}, corpus))


def test_coefficients_that_nothing_reads_are_refused(corpus: Corpus) -> None:
    """A balance coefficient without its loss, the loss without its coefficient, another optimizer than the lab's."""
    data, training = describe_data({"source": []}, corpus), mue.Training(128, 10)

    def run(settings: Settings, **changes: object) -> Run:
        plan = mue.transfer(BASE, TARGET, TUNED.replace(**changes), base_training=training, training=training)
        return Run(plan, settings, data)

    with pytest.raises(ValueError, match="turns on"):
        run(SETTINGS, balance=0.01)
    with pytest.raises(ValueError, match="coefficient"):
        run(Settings(balance="loss"))
    with pytest.raises(ValueError, match="adamw and muon"):
        run(SETTINGS, optimizer="lion")


def test_a_warmup_in_steps_must_leave_something_of_the_run(corpus: Corpus) -> None:
    data, training = describe_data({"source": []}, corpus), mue.Training(128, 10)
    plans = {
        w: mue.transfer(BASE, TARGET, TUNED.replace(warmup=w), base_training=training, training=training)
        for w in (9, 10)
    }
    assert Run(plans[9], SETTINGS, data).key
    with pytest.raises(ValueError, match="warmup = 10 steps is the whole run of 10"):
        Run(plans[10], SETTINGS, data)


def test_a_balance_loss_that_no_router_reads_is_refused(corpus: Corpus) -> None:
    """A router without a matrix has nothing that the loss could train; one beside it that has one may be balanced."""
    data, training = describe_data({"source": []}, corpus), mue.Training(128, 10)
    settings, tuned = Settings(balance="loss"), TUNED.replace(balance=0.01)

    def run(*routers: str) -> Run:
        blocks = tuple(mue.Block(layers=1, experts=4, active=2, expert=16, router=router) for router in routers)
        shape = mue.Mixed(32, blocks, head_dim=16, sequence=32)
        plan = mue.transfer(BASE, shape, tuned, base_training=training, training=training)
        return Run(plan, settings, data)

    with pytest.raises(ValueError, match=r"the hash router of .* has none"):
        run("hash", "random")
    for routers in (("sigmoid", "softmax"), ("hash", "softmax")):
        assert run(*routers).settings.balance == "loss"


def test_a_z_loss_without_logits_is_refused(corpus: Corpus) -> None:
    """It is a loss on a router's logits: one that draws or hashes has none, and the coefficient was read by nothing."""
    data, training = describe_data({"source": []}, corpus), mue.Training(128, 10)

    def run(*routers: str, z: float = 1e-3) -> Run:
        blocks = tuple(mue.Block(layers=1, experts=4, active=2, expert=16, router=router) for router in routers)
        shape = mue.Mixed(32, blocks, head_dim=16, sequence=32) if routers else BASE
        plan = mue.transfer(BASE, shape, TUNED.replace(z=z), base_training=training, training=training)
        return Run(plan, SETTINGS, data)

    with pytest.raises(
        ValueError, match=r"z = 0\.001 is the coefficient of a loss on a router's logits, and the hash router"
    ):
        run("hash", "random")
    assert run("hash", "softmax") and run("sigmoid") and run() and run("hash", z=0.0)


def test_whole_numbers_of_settings_are_plain_ones() -> None:
    assert (
        Settings(eval_sequences=64.0, eval_every=10.0).to_dict() == Settings(eval_sequences=64, eval_every=10).to_dict()
    )  # type: ignore[arg-type]
    assert type(Settings(log_every=5.0).log_every) is int  # type: ignore[arg-type]


def test_a_router_that_computes_otherwise_now_has_other_keys(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of before are not taken for runs of now; routers that stayed keep their keys."""
    data, training = describe_data({"source": []}, corpus), mue.Training(128, 10)

    def run(router: str) -> Run:
        target = replace(TARGET, router=router)
        return Run(mue.transfer(BASE, target, TUNED, base_training=training, training=training), SETTINGS, data)

    assert run("dtop-p").effective["settings"]["router_revisions"] == {"dtop-p": 1}
    assert "router_revisions" not in run("sigmoid").effective["settings"]
    before, kind = run("dtop-p").key, ROUTERS.lookup("dtop-p")
    with monkeypatch.context() as changed:
        changed.setitem(vars(kind), "revision", kind.revision + 1)  # frozen, and the registry's own
        assert run("dtop-p").key != before
    assert run("dtop-p").key == before


def test_a_run_that_goes_on_clears_what_a_killed_write_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.locked("k") as folder:
        left = [folder / ".checkpoint.safetensors.abc", folder / ".ema-0.9.safetensors.abc"]
        others = [folder / "notes.txt", folder / "ema-0.9.safetensors"]
        for path in (*left, *others):
            path.touch()
    with store.locked("k"):
        assert not any(path.exists() for path in left) and all(path.exists() for path in others)
