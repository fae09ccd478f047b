"""Prepares media and captions into latents, text contexts and shards; restartable and content-addressed."""
