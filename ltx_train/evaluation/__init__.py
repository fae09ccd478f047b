"""Held-out measurements: fixed noise, paired comparisons, intervals over identities."""
