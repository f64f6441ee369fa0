"""Many edits on many prompts: planned, run, stored as they are done, and resumed."""
