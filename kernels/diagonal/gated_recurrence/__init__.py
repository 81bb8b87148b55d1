"""Gated recurrence (RG-LRU): one decayed number per channel, read as it stands."""
