"""State-space models with a state dimension per layer."""
