"""The ledger's schema from its first version on, run by Alembic from within (open_ledger)."""
