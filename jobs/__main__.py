"""`python -m rollsight.jobs`: the command without its script, for machines where that is not on the PATH."""

from rollsight.jobs.cli import main

main()
