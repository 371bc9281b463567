"""Hard examples: requests that the edge model was not sure of, kept on this agent's disk for whoever retrains it.

    data plane ─offer─▶ Collector ─rules─▶ queue ─disk thread─▶ SampleStore ◀─ SampleUploader ─▶ controller
                                                                     └─ nanofleet-agent samples list|export|purge

Nothing of it stands on a request's path but `Collector.offer`, which decides and hands over. Data of privacy class
`device` is never taken; that of class `site` only when the settings say so, and it is never uploaded.
"""
