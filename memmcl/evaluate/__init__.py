"""Putting rows to a model: label scores, answers, their uncertainty."""
