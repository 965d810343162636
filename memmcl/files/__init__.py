"""Files and folders of others: what may be opened, read within bounds, and what failures mean."""
