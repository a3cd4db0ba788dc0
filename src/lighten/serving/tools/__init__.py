"""Tools that a model may call: what clients send of them, and calls in what it writes."""
