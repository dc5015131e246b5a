"""DBOS + PostgreSQL, as a peer."""
