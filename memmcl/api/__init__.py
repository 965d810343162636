"""What the front door opens: merging, searching, anchoring, runs, a model in use. The command line is a skin."""
