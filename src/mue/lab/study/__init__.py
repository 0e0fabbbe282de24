"""Studies: axes × targets × approaches × multipliers of the learning rate × seeds, trained once each and measured together.

What a rule claims is that values tuned on a base serve a target. A study trains the targets with them and around them, by every
approach side by side, and says with intervals what the claim was worth. Here: what a study is (spec), its rows on disk (rows), the
loop that trains them (run), what they say (measure), the page (report, figures). Not here: tuning the base
(``mue.lab.sweep``), fitting a valley (``mue.lab.valley``), the fitted laws that an approach may name (``mue.rules.laws``).
"""
