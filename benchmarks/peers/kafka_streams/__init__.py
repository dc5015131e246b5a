"""Kafka Streams, as a peer of the stream workload."""
