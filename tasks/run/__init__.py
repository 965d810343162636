"""The run: its identity, its store, its resident model, and the services that it needs."""
