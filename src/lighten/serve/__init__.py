"""Serve: many adapters over one base, behind one address."""
