"""The effectful edge: Prefect tasks, Ray, the store. The method itself is in `memmcl`."""
