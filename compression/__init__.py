"""The mathematics of truncating state-space models: tensors in, plans out."""
