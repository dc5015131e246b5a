"""The figures of docs/benchmarks.md, measured on the embedded Kafka. Run with `make bench`."""
