"""The merge search on Ray Tune."""
