"""`trunkline check`: what is proved about a recipe before GPU-hours are spent on it, one file each."""
