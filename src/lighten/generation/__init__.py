"""Answers token by token: rows of many adapters in one batch of one base.

Prompts, templates and texts are its callers' business.
"""
