"""A base of which a few layers are in memory: the others come when a pass asks for them."""
