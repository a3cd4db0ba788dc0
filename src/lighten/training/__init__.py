"""Training: a cohort of adapters over one frozen base, from a recipe to a run folder."""
