"""Methods that learn from data: what is computed from features, not from tensors alone."""
