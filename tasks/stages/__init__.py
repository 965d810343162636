"""The stages of the DAG: Prefect tasks, and what they read and publish."""
