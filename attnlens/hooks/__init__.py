"""The instrument: the only room that touches a model while it runs."""
