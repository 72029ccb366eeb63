"""The command, the console and whole-roll jobs: the only floor that prints."""
