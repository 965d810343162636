"""What the Prefect UI shows, and what reaches it: tables, progress, logs, cancelling, history."""
