"""The version of memmcl."""

__version__ = "0.1.0"
