"""Models, their versions and variants, the bytes behind them, and how a model gets in.

`model` (values) · `store` (the port to a database) · `blobs` (content-addressed bytes on disk) · `pipeline` (one
publication, stage by stage) · `publications` (the queue of them) · `service` (`Registry`, what the others call).
"""
