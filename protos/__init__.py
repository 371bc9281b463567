"""Wire contracts: one folder per API and version, generated code beside its source.

`python -m protos.generate` rewrites the generated files; `--check` fails when they are stale.
"""
