"""Perdure beside what people use today: the same workloads, one machine, in turn. Run with `make bench-peers`."""
