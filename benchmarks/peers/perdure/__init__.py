"""Perdure itself, in the same rounds."""
