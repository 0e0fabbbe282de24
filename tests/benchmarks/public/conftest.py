from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest

Optimum = Callable[[dict[str, float]], float]
RATES = [round(2.0 ** (-14 + k / 2), 8) for k in range(17)]
DENSE = [{"h": 1024, "ffnh": 4096, "numl": 8, "N": 2e8}, {"h": 2048, "ffnh": 8192, "numl": 16, "N": 8e8}]
MOE = [
    {"moe_name": "1in8", "h": 1024, "numl": 8, "nume": 8, "topk": 1, "moeh": 512, "sed": 512, "N": 4e8, "Na": 1e8},
    {"moe_name": "2in8", "h": 1024, "numl": 8, "nume": 8, "topk": 2, "moeh": 512, "sed": 512, "N": 4e8, "Na": 2e8},
]
CURVATURE = 0.03


@pytest.fixture
def made_up(tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Writes a file in Step Law's format whose valleys are parabolas with their minima where one says; gives path and sum."""

    def write(
        kind: str, optimum: Optimum, tokens: tuple[float, ...] = (2e9, 8e9, 3.2e10), rates: list[float] = RATES
    ) -> tuple[Path, str]:
        path = tmp_path / f"{kind}.csv"
        shapes = DENSE if kind == "dense" else MOE
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, [*shapes[0], "D", "bs", "lr", "ti", "loss", "smooth loss", "exp_name"])
            table.writeheader()
            for shape in shapes:
                for d in tokens:
                    for sequences in (16, 32, 64, 128, 256):
                        numbers = {
                            "B": math.log2(sequences * 2048),
                            "D": math.log2(d),
                            "N": math.log2(float(shape["N"])),
                        }
                        best = optimum(numbers)
                        # the loss over batch is lowest where D^0.5 says: 2^17 tokens at 2^33
                        floor = 3 - 0.05 * numbers["D"] + 0.01 * (numbers["B"] - 17 - 0.5 * (numbers["D"] - 33)) ** 2
                        for lr in rates:
                            loss = floor + CURVATURE * (math.log2(lr) - best) ** 2 / 2
                            steps = round(d / sequences / 2048)
                            row = shape | {
                                "D": d,
                                "bs": sequences,
                                "lr": lr,
                                "ti": steps,
                                "loss": loss,
                                "smooth loss": loss,
                            }
                            table.writerow(row | {"exp_name": "made up"})
        return path, hashlib.sha256(path.read_bytes()).hexdigest()

    return write
