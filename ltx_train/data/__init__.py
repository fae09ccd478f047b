"""Clips to shards, and shards to batches."""
