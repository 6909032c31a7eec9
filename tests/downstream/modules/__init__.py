"""Tile Sorter: pictures of tiles by their pattern, on a trunk that was trained elsewhere."""
