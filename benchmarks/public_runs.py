"""Published sweeps beside our rules and others' laws: how far lr* moves, what each predicts, what the error costs.

    git clone https://github.com/step-law/steplaw
    python benchmarks/public_runs.py steplaw/data/moe_lr_bs_loss.csv steplaw/data/dense_lr_bs_loss.csv
        [--json docs/results/public-runs.json] [--figures docs/images]

Nothing is downloaded and nothing of the files is kept: their sums are checked, and numbers derived from them are printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mue.util.files import write_json
from public import steplaw
from public.analysis import analyse
from public.cells import cells_of


def rounded(value: Any) -> Any:
    """Four decimals are more than any of these figures is worth, and make the file short."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(own) for key, own in value.items()}
    return [rounded(own) for own in value] if isinstance(value, list | tuple) else value


def interval(estimate: dict[str, Any], key: str = "slope") -> str:
    low, high = estimate["interval"]
    cautious = estimate.get("over_shapes")
    return f"{estimate[key]:+.2f} [{low:+.2f}, {high:+.2f}]" + (
        f" (shapes: [{cautious[0]:+.2f}, {cautious[1]:+.2f}])" if cautious else ""
    )


def show(found: dict[str, Any]) -> None:
    """The tables, as text."""
    for kind in ("moe", "dense"):
        own = found[kind]
        print(
            f"\n{kind}: {own['runs']} runs, {own['cells']} of {own['cells of all']} cells with a minimum inside their grid"
        )
        print("  octaves of lr* per doubling, 95 % by series (by shapes)")
        for axis, estimate in own["slopes"].items():
            if estimate["slope"] is not None:
                print(f"    {axis:24} {interval(estimate)}")
        for region, estimate in own["exponents"].items():
            terms = ", ".join(f"{name} = {interval(term, 'value')}" for name, term in estimate["terms"].items())
            print(f"    {region:24} {terms}; {estimate['cells']} cells")
        for what, estimate in own["along the best batch"].items():
            if what != "points":
                print(f"    {what} along the best batch ∝ D^{estimate['exponent']:.2f} {estimate['over_shapes']}")
    for name, scored in found["scores"].items():
        print(f"\n{name}: {scored['pairs']} pairs, lr* moved {scored['moved']:+.2f} {scored['moved_interval']}")
        for law, row in sorted(scored["laws"].items(), key=lambda item: item[1]["cost"]):
            low, high = row["cost_interval"]
            print(
                f"    {law:32} says {row['says']:+.2f}, off by {row['error']:+.2f} (rms {row['rms']:.2f}), {row['cost']:.4f} nats [{low:.4f}, {high:.4f}]"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in steplaw.SHA256:
        parser.add_argument(kind, type=Path, help=f"data/{kind}_lr_bs_loss.csv of github.com/step-law/steplaw")
        parser.add_argument(f"--sha256-{kind}", default=steplaw.SHA256[kind], help="of a later version of that file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figures", type=Path, help="folder for the pictures")
    options = parser.parse_args()
    sums = {kind: getattr(options, f"sha256_{kind}") for kind in steplaw.SHA256}
    runs = {kind: steplaw.read(kind, getattr(options, kind), sums[kind]) for kind in sums}
    found = rounded(
        {"command": "python benchmarks/public_runs.py MOE DENSE --json FILE --figures FOLDER", "sha256": sums}
        | analyse(runs)
    )
    show(found)
    if options.json:
        write_json(options.json, found)
    if options.figures:
        from public.figures import draw

        draw({kind: cells_of(own)[0] for kind, own in runs.items()}, json.loads(json.dumps(found)), options.figures)


if __name__ == "__main__":
    main()
