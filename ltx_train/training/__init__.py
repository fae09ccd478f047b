"""A run: its loop, its optimizer step, its state, and the signals that end it."""
