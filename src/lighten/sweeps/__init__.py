"""The sweep: many settings over one base in little more than one run, and which to take."""
