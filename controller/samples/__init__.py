"""Hard examples on their way from agents to a person: pulls, and the spool in which they wait to be fetched.

    create ─▶ SampleDesk.send ─▶ agents ─offer, receive─▶ Spool (files below data_dir) ─▶ fetched ─▶ expired or dropped

The spool's folder is the record: there is nothing of it in the database, so neither outlives the other, and no backup
carries what devices sent.
"""
