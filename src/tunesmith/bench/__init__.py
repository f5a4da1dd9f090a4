"""Methods side by side: one task, one budget, one table."""
