"""One file per schema version, `v0001_…`; a released one is never changed."""
