"""Numbers of a run: collected, written to metrics.jsonl, sent to trackers, shown on the console."""
