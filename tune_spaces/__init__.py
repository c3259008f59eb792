"""Search spaces for `rayduce tune`: one module a space, with its knobs and what they set.

A space of your own is a file like the ones here, `--space path/to/it.py`.
"""
