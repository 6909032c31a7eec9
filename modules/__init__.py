"""The models: `backbone/` the trunk, `networks/` torch modules on it, `objectives/` one LightningModule a task.

Importing this package costs nothing; take each objective from its file (`modules/objectives/image_classifier.py`).
"""
