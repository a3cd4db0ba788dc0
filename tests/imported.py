"""Imported last by the process that the tests' commands are forked from.

What it has imported stays: nobody need look for garbage there, and copy each page by doing so.
"""

import gc

gc.collect()
gc.freeze()
