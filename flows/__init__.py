"""The DAGs: straight-line Prefect flows."""
