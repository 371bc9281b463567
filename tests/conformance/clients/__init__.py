"""Programs for the environment of `tritonclient`; they import nothing of ours but each other."""
