"""Celery + Redis, as a peer."""
