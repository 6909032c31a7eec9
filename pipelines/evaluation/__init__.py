"""`trunkline evaluate` and the callback that measures the same during training."""
