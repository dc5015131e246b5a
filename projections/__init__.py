"""The read side: folds of the event log into progress, dead letters and views, and the HTTP API over them."""

assert __name__ == "perdure.projections", "import perdure.projections, not projections: two copies would disagree"
