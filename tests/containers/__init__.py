"""What needs containers: run where a Docker daemon answers, passed over by name where none does."""
