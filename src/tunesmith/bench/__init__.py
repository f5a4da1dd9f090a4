"""Methods side by side: one task, one budget, one table."""

from .compare import compare, pareto

__all__ = ["compare", "pareto"]
