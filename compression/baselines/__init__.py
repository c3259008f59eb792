"""What truncation in mid-training is compared with, as far as it trains otherwise.

What only cuts otherwise is a score like any other: random, smallest (`compression.scores`) and magnitude.
"""
