"""The objectives: LightningModules that turn a batch into a loss. All derive from the class in `base.py`."""
