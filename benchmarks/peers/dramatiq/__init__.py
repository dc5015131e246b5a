"""Dramatiq + Redis, as a peer."""
