"""Training: optimizer, state, the jitted step and the loop."""
