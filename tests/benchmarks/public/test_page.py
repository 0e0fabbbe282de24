"""The page quotes its file: every headline number is computed here from the numbers in docs/results/public-runs.json."""

from __future__ import annotations

import json
import re

import pytest

from public.steplaw import SHA256
from support.paths import ROOT

FOUND = json.loads((ROOT / "docs/results/public-runs.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/findings/public-runs.md").read_text(encoding="utf-8")
REGIONS = ("below the best batch", "within an octave of it", "above it", "all")


def number(x: float) -> str:
    return re.sub(r"^-(0\.0+)$", r"\1", f"{x:.2f}")


def interval(low: float, high: float, between: str = ", ") -> str:
    return f"{number(low)}{between}{number(high)}"


def cell(region: str, kind: str, term: str) -> str:
    own = FOUND[kind]["exponents"][region]["terms"][term]
    return f"{number(own['value'])} [{interval(*own['interval'])}] ({interval(*own['over_shapes'], ' to ')})"


def scored(scenario: str, law: str) -> str:
    return f"{FOUND['scores'][scenario]['laws'][law]['cost']:.4f}"


@pytest.mark.parametrize("region", REGIONS)
def test_the_table_of_exponents(region):
    row = " | ".join(cell(region, kind, term) for kind in ("moe", "dense") for term in ("p", "q"))
    assert f"| {region} | {row} |" in PAGE


@pytest.mark.parametrize(
    ("kind", "axis", "words"),
    [
        ("moe", "tokens, batch fixed", "MoE {} octave"),
        ("dense", "tokens, batch fixed", "dense {}. **Batch"),
        ("moe", "batch, tokens fixed", "**Batch × 2 at fixed tokens**: {} and"),
        ("dense", "batch, tokens fixed", "and {}. **Batch × 2 at fixed steps**"),
        ("moe", "batch, steps fixed", "**Batch × 2 at fixed steps** (MoE only): {}"),
    ],
)
def test_the_slopes(kind, axis, words):
    own = FOUND[kind]["slopes"][axis]
    assert words.format(f"{number(own['slope'])} [{interval(*own['interval'])}]") in PAGE


def test_the_path_of_the_best_batch_and_the_bend():
    for what, words in (("batch", "grows as D^{} (MoE) and D^{} (dense"), ("lr", "*rises* as D^{}")):
        values = [number(FOUND[kind]["along the best batch"][what]["exponent"]) for kind in ("moe", "dense")]
        assert words.format(*values) in PAGE
    bend = FOUND["dense"]["bend"]
    assert f"κ = {number(bend['kappa']['value'])} [{interval(*bend['kappa']['interval'])}]" in PAGE
    assert f"growing as D^{number(bend['gamma']['value'])}" in PAGE
    assert f"{round(2 ** bend['log2_noise_batch']['value'] / 2048)} sequences" in PAGE


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("MoE: more tokens, batch fixed", "| MoE: tokens up, batch fixed ({}) |"),
        ("dense: more tokens, batch fixed below the best", "| dense: tokens up, batch below the best ({}) |"),
        ("dense: more tokens, batch fixed above the best", "| dense: tokens up, batch above the best ({}) |"),
        ("MoE: larger batch, tokens fixed, up to the best", "| MoE: batch up to the best ({}) |"),
        ("MoE: larger batch, tokens fixed, beyond the best", "| MoE: batch beyond the best ({}) |"),
        ("dense: larger batch, tokens fixed, beyond the best", "| dense: batch beyond the best ({}) |"),
        ("MoE: larger batch, steps fixed", "| MoE: batch up, steps fixed ({}) |"),
        ("MoE: more tokens, best batch to best batch", "| MoE: tokens up, best batch to best batch ({}) |"),
        ("dense: more tokens, best batch to best batch", "| dense: the same ({}) |"),
    ],
)
def test_the_table_of_costs(scenario, words):
    own = FOUND["scores"][scenario]
    (line,) = (line for line in PAGE.splitlines() if line.startswith(words.format(own["pairs"])))
    laws = (
        "complete-mue",
        "complete-mue, p = 0.5, q = 0",
        "complete-mue, p = 0.5, q = 0.25",
        "standard",
        "Step Law",
        "Marin May",
        "Zhou et al.",
        "Ling",
    )
    assert [entry.rsplit(" ", 1)[-1] for entry in line.strip(" |").split(" | ")[2:]] == [
        scored(scenario, law) for law in laws
    ]
    assert float(line.split(" | ")[1]) == pytest.approx(own["moved"], abs=0.006)


@pytest.mark.parametrize(
    ("moves", "words"),
    [
        ("moe, within 1.5 octaves of the best batch", "MoE, within 1.5 octaves of the best batch"),
        ("dense, within 1.5 octaves of the best batch", "dense, the same"),
        ("moe, all batches", "MoE, all batches"),
        ("dense, all batches", "dense, all batches"),
    ],
)
def test_the_pair_that_costs_least(moves, words):
    own = FOUND["cheapest exponents"][moves]
    pair = " | ".join(f"{number(own[term]['value'])} [{interval(*own[term]['interval'])}]" for term in ("p", "q"))
    others = " | ".join(
        f"{own['cost of others'][k]:.4f}" for k in ("0.5, 0.5", "0.5, 0.25", "0.5, 0", "0.35, 0", "0, 0")
    )
    assert f"| {words} ({own['pairs']:,}) | {pair} | {own['cost']:.4f} | {others} |" in PAGE


def test_shapes_sizes_and_other_sources():
    for scenario, words in (
        ("all at once: small dense → wider and deeper dense", "{} nats with p = q = ½, {} with (½, 0), {} with (½, ¼)"),
        ("all at once: small dense → MoE", "{}, {}, {}; `standard`"),
    ):
        laws = ("complete-mue", "complete-mue, p = 0.5, q = 0", "complete-mue, p = 0.5, q = 0.25")
        assert words.format(*(scored(scenario, law) for law in laws)) in PAGE
    for pair, words in zip(
        FOUND["moe"]["shapes"], ("active expert {}", "coarser experts {}", "for one {}", "×25, {}"), strict=True
    ):
        assert (
            words.format(f"{'+' if pair['moved'] > 0 else ''}{number(pair['moved'])} [{interval(*pair['interval'])}]")
            in PAGE
        )
    size = FOUND["dense"]["size"]["by size"]
    assert f"N^{number(size['total']['value'])} ({interval(*size['total']['interval'], ' to ')})" in PAGE
    marin = FOUND["marin"]["tokens"]
    assert f"{number(marin['slope'])} [{interval(*marin['interval'])}] octave" in PAGE


def test_the_inputs_are_named():
    assert FOUND["sha256"] == SHA256
    assert all(sha256 in PAGE for sha256 in SHA256.values())


def test_another_number_would_be_seen():
    assert cell("all", "moe", "p") in PAGE
    assert cell("all", "moe", "p").replace("0.34", "0.35") not in PAGE
