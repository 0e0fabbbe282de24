"""How each hyperparameter scales: one published rule, one table, one file.

Here: roles, the algebra of factors, what a table is, the rules as data with the source of each row, what another optimizer
makes of them. Not here: shapes' ratios and the values that follow (``mue.plan``), and anything that needs torch.
"""

from mue.rules.options import OPTIONS, option_names
from mue.rules.registry import RULES, get_rule
from mue.rules.roles import ROLES
from mue.rules.sde import SDE
from mue.rules.table import AXES, Row, Rule

__all__ = ["AXES", "OPTIONS", "ROLES", "RULES", "SDE", "Row", "Rule", "get_rule", "option_names"]
