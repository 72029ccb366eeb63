"""The sub-commands of `inspect`, by subject: each parses and calls; heavy imports stay inside them."""
