"""Searching a merge: what is searched, how candidates are scored, which phases follow, a driver in this process."""
