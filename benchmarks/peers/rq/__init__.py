"""RQ + Redis, as a peer."""
