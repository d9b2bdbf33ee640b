"""The data sets: what there is, where it lies, and its labels."""
