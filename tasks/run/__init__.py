"""The run: what it is, its store, its resident model, the Ray and the services that it stands on."""
