"""Child processes for work on files that may be hostile or huge: one order in, one reply out, within bounds.

`caller` is the parent's side, `confinement` the child's.
"""
