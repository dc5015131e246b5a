"""The engine: a pure core (decide, evolve) and a thin shell (runner, store, log)."""

assert __name__ == "perdure.streams", "import perdure.streams, not streams: two copies of a module would disagree"
