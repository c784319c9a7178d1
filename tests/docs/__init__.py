"""The documents, taken at their word: every example is run, every event is compared."""
