"""What agents write down: what became of their requests, by the hour, and what happened to them.

    model    the values, and what is believed of an agent's clock
    service  taking in and giving out;  store  the port to a database

They come over RecordService, in order and at least once; taking one twice changes nothing.
"""
