"""Faust, as a peer of the stream workload."""
