"""Edges outward: the embedded Kafka, checkpoint stores, and later sinks and alerts."""

assert __name__ == "perdure.connectors", "import perdure.connectors, not connectors: two copies would disagree"
