"""Frozen weights: their precision, the stores they wait in, and the stream that brings them to the device."""
