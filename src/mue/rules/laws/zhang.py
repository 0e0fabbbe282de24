"""Zhang et al. (2410.21676): the critical batch as a power of the tokens, at a fifth more steps than in proportion."""

from __future__ import annotations

from mue.rules.laws.law import LAWS, Law, Power

SEQUENCE = 512  # tokens in one of its sequences, which batches are counted in
MILLION = 1e6


@LAWS.register("zhang", place=10)
def zhang() -> Law:
    """B* = 22.91 · D^0.47, D in millions of tokens, B* in sequences of 512.

    Quotations leave the units out. Sequences of 512 and batches of 64 to 16,384 of them are in their configs; with millions all three
    of their fits agree (93.20 · N^0.47 at 20 tokens a parameter, 621.34 · N^0.087 at fixed tokens), and with no other unit.
    """
    return Law(
        name="zhang",
        title="Zhang et al.",
        fitted="dense models of 85 M to 1.2 B on C4, to four times 20 tokens a parameter; Adam; sequences of 512",
        sets={
            "critical batch": Power(
                {"D": 0.47},
                22.91 * SEQUENCE / MILLION**0.47,
                # 20 tokens for each parameter of the smallest model, of the largest, and four times that of one of 302 M
                {"D": (1.7e9, 2.4e10), "N_a": (0, 1.2e9)},
                "at which a loss takes 1.2 times the steps",
            )
        },
        source="arXiv 2410.21676, fits of its Figure 1 as quoted by reviews; units by the authors' configs",
    )
