"""2:4 semi-structured weights: contenders, what proves them, and their plot."""
