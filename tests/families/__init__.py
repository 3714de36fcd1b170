"""Which methods work on which model families: checks of behaviour, and the table of `docs/models.md`."""
