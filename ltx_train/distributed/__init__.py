"""The processes of a run: ranks, collectives, mapped memory, sequence parallelism. Knows no model."""
