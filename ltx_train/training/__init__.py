"""The training loop: Lightning module, checkpoints, preemption, tracking."""
