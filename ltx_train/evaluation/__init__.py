"""Measurements that can be believed: fixed noise, paired comparisons, intervals by identity."""
