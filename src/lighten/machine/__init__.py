"""Which machine this is, or a named one: memory, cores, formats, datasheets."""
