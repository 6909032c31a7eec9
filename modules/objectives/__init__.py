"""One LightningModule an objective: what turns a batch into a loss, on `base.py`, which all share."""
