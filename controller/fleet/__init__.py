"""The fleet: which agents there are, what each shall run, what each says it runs.

    deploy ──▶ resolution (pure) ──▶ desired state per agent ──▶ sessions ──push──▶ agent
                                                                    agent ──report──▶ heard ──▶ store

`model` holds the values, `resolution` decides what an agent shall run, `use_cases` are the transactions, `store` is the
port to a database, `sessions` are the live streams, `service.Fleet` is what the rest of the controller calls. No SQL
and no gRPC here: `controller.storage.fleet` and `controller.api.agents_grpc` are the edges.
"""
