"""How the schema came to be, one step per file in `versions`; `Database.migrate` runs what is missing."""
