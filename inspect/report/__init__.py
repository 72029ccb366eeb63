"""The page of a roll: one offline file."""
