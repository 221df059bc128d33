"""What several test modules need: models, prefixes, contexts, cases."""
