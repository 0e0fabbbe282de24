"""``mue sample``: a PNG that is whole, of a run or of exported weights, and one line for what cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from mue.lab.train.run import Store
from mue.lab.train.session import train
from support.command_line import in_process, refused
from support.diffusion import images, run_of
from support.trained import moe_run_of_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, store = run_of(images(), ema=[0.5, 0.9]), Store(tmp_path_factory.mktemp("run"))
    train(run, store, images(), keep_weights=True)
    return store.folder(run.key)


def test_it_draws_what_is_asked_for_and_the_same_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*arguments: object) -> bytes:
        out = tmp_path / "out.png"
        code, said, err = in_process(capsys, monkeypatch, "sample", *arguments, "-o", out, "--steps", 3)
        assert code == 0 and "columns: " in said, err
        return out.read_bytes()

    first = drawn(folder, "--seeds", 2)
    picture = matplotlib.image.imread(tmp_path / "out.png")
    assert picture.shape[:2] == (2 * 54 + 6, 3 * 54 + 6)
    assert drawn(folder.parent.parent, "--seeds", 2) == first
    own = drawn(folder, "--seeds", 2, "--class", "down")
    picture_of_one = matplotlib.image.imread(tmp_path / "out.png")
    # the second column, to a shade
    assert np.abs(picture_of_one[6:54, 6:54] - picture[6:54, 60:108]).max() < 2 / 255
    others = [
        drawn(folder, "--seeds", 2, *more)
        for more in (("--ema", 0.5), ("--ema", 0.9), ("--ema", 0), ("--guidance", 3), ("--sampler", "euler"))
    ]
    assert len({own, *others}) == 6
    # Exported weights draw the same, without the run.
    code, _, err = in_process(
        capsys, monkeypatch, "export-weights", folder, "--to", "mue", "--ema", 0.9, "-o", tmp_path / "weights"
    )
    assert code == 0, err
    assert {p.name for p in (tmp_path / "weights").iterdir()} == {"config.json", "model.safetensors"}
    assert drawn(tmp_path / "weights", "--seeds", 2) == others[1]
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "weights", plain)
    config = json.loads((plain / "config.json").read_text())
    del config["weights"]  # as it was written before
    (plain / "config.json").write_text(json.dumps(config))
    for weights, words in ((tmp_path / "weights", "the average of decay 0.9"), (plain, "the weights of the folder")):
        arguments = ("-o", tmp_path / "out.png", "--steps", 1)
        assert f", {words}\n" in in_process(capsys, monkeypatch, "sample", weights, *arguments)[1]
        refused(in_process(capsys, monkeypatch, "sample", weights, "--ema", 0.5, *arguments), f"it has {words} alone")


def test_the_average_of_lowest_loss_is_taken(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "runs" / folder.name
    shutil.copytree(folder, own)
    result = (own / "result.json").read_text()
    for lowest, words in (
        ("0.5", "the average of decay 0.5"),
        ("0.9", "the average of decay 0.9"),
        ("", "the last weights"),
    ):
        losses = {d: 0.1 if d == lowest else 9.0 for d in ("0.5", "0.9")}
        (own / "result.json").write_text(
            result.replace('"ema_val_loss"', f'"ema_val_loss": {str(losses).replace(chr(39), chr(34))}, "before"')
        )
        _, said, err = in_process(
            capsys, monkeypatch, "sample", own, "-o", tmp_path / "a.png", "--steps", 1, "--seeds", 1
        )
        assert words in said, err


def test_what_cannot_be_is_one_line(
    folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    language = moe_run_of_bytes(texts, tmp_path / "text", steps=2)
    bare = tmp_path / "bare" / "runs" / folder.name
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    under_way, none = (tmp_path / name / "runs" / folder.name for name in ("under_way", "none"))
    shutil.copytree(folder, under_way, ignore=shutil.ignore_patterns("*.safetensors", "result.json"))
    shutil.copyfile(folder / "model.safetensors", under_way / "checkpoint.safetensors")
    shutil.copytree(folder, none, ignore=shutil.ignore_patterns("ema-*"))
    out = tmp_path / "new" / "a.png"
    for words, arguments in {
        ("--class 'sqare' is none", "did you mean 'square'"): (folder, "--class", "sqare"),
        ("sampler 'huen'", "'heun'"): (folder, "--sampler", "huen"),
        ("no average", "0.99", "it keeps 0.5, 0.9"): (folder, "--ema", 0.99),
        ("no average", "its averages (0.5, 0.9) are written when it ends"): (under_way, "--ema", 0.9),
        ("no average", "it keeps none; say [run] ema"): (none, "--ema", 0.9),
        ("guidance must be at least 0",): (folder, "--guidance", -1),
        ("keeps no weights", "mue train"): (bare,),
        ("draws no images", "mue generate"): (language,),
    }.items():
        refused(in_process(capsys, monkeypatch, "sample", *arguments, "-o", out), *words)
    refused(in_process(capsys, monkeypatch, "sample", folder, "-o", tmp_path / "a.jpg"), "ends in .png")
    assert not out.parent.exists()
    for command, more in {"generate": ("a",), "export-weights": ("--to", "transformers", "-o", tmp_path / "x")}.items():
        refused(in_process(capsys, monkeypatch, command, folder, *more), "trained on images", "mue sample")
    refused(in_process(capsys, monkeypatch, "eval", folder), "only language models are asked about text")
