"""Perdure: durable long-running tasks on Kafka."""
