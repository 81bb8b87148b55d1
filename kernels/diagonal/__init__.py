"""Diagonal recurrences: selective scan and gated recurrence walk the same schedule."""
