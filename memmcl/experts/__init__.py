"""Experts: LoRA adapters, one per subtask, trained so that they can be merged."""
