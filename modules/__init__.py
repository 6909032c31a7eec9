"""Models of the house: `backbone/` the trunk, `networks/` torch modules on it, and one LightningModule an objective."""
