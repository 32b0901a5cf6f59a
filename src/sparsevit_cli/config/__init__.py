"""Experiment configuration: the schema, its loader and its reference page."""
