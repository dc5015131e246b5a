"""Restate, as a peer."""
