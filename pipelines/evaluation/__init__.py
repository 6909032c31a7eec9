"""`trunkline evaluate`, and the callback that takes the same measurements during training."""
