"""A controller's state as a folder, and back.

    data_dir ─▶ keys, database (SQLite's own backup), keys again, blobs ─▶ TARGET.partial ─▶ manifest ─▶ TARGET
    SOURCE   ─▶ every digest ─▶ data_dir.restoring ─▶ marked as restored ─▶ data_dir

Either is there whole or not at all, whatever interrupts. Not in it: traces, packs and certificates that are made anew.
"""
