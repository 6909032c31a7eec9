"""Models of the house: `backbone/` the trunk, `networks/` torch modules on it, and one LightningModule an objective.

Importing this package costs nothing; take the objectives from their files (`modules/image_classifier.py`).
"""
