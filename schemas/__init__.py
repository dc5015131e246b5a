"""The contract: messages, codec, topics, limits and errors. Imports nothing else of Perdure."""

assert __name__ == "perdure.schemas", "import perdure.schemas, not schemas: two copies of a module would disagree"
