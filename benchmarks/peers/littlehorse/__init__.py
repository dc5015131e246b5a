"""LittleHorse, as a peer."""
