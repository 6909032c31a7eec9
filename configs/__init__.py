"""Recipes (`<model>/<recipe>.yaml`) and machines (`trainer/<where>.yaml`), found by short name on the command line."""
