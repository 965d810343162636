"""Merging: task vectors of experts on one base, combined by the coefficients of a genome."""
