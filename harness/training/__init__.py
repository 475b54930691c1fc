"""Training: a generator of steps, and the pieces it is given (optimizer, schedule, device, checkpoints)."""
