"""The stages of the DAG: Prefect tasks, and the artifacts that they read and publish."""
