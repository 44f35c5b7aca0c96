"""Attention backends of other libraries: each translates metadata and no more."""
