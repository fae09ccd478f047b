"""What may go wrong with gradients and losses, and the averages that keep them steady."""
