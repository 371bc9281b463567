"""Checking, compressing and measuring models that somebody else made.

`workshop` starts a child process for every step and is all that the registry uses; `child` is that process, which calls
`inspect`, `recipes`, `datasets`, `evaluate` and `calibrate` (pure). `model` holds the values that cross the border.
"""
