"""The commands that use what was trained, a file each."""
