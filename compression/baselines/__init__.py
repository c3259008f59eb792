"""What truncation in mid-training is compared with."""
