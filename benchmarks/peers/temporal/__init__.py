"""Temporal's dev server, as a peer."""
