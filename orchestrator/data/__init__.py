"""Sources, their Arrow files, and batches by step."""
