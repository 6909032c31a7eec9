"""Commands besides training, one file each; most of them use a checkpoint."""
