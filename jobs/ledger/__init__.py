"""The ledger: what was due, who does it, what came of it, and what a person must be told."""
