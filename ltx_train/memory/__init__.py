"""Memory traded for time: where weights wait, what blocks keep, how they run, and the plan of all that."""
