"""Serving with the cohort's own operation: rows of many adapters in one batch of one base.

`Engine` answers token by token; prompts, templates and texts are its callers' business.
"""
