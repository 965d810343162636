"""The base model: resolved, loaded, and run without computing anything twice."""
