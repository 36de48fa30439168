"""Scores and records in the formats of other projects, read and written."""
