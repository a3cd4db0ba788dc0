"""Several processes that train one recipe together: how they start, agree and end."""
