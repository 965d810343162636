"""The base model: found, loaded, and run without computing anything twice."""
