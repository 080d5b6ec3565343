"""Rules: how the gradients of tasks are combined, as objects that hold all settings."""

from bayesagg.rules.base import Memory, Plan, Rule
from bayesagg.rules.likelihood import LikelihoodRule
from bayesagg.rules.paper import PaperRule

__all__ = ["LikelihoodRule", "Memory", "PaperRule", "Plan", "Rule"]
