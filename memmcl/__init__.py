"""memmcl: one sentiment model out of many LoRA experts, merged by evolution and kept retrained."""

__version__ = "0.1.0"
