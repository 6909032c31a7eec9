"""The commands: the only floor that knows both models and data."""
