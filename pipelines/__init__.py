"""The commands: the only part that imports both `modules` and `datamodules`."""
