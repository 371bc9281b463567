"""Who belongs to the fleet: certificates for agents and parts of ours, tokens that let agents in, bans.

    token ──▶ enrol ─┐                                        ┌─ authorities (sign, rotate)      keys (files)
    nonce ──▶ renew ─┼──▶ use_cases, one transaction each ────┤
    operator ─▶ ban ─┘                                        └─ store: tokens, identities, authorities
    every call on the mTLS port ──▶ admission (in memory): is this key the one that we certified last?

`model` holds the values, `authority` makes and checks certificates, `renewal` proves who asks for the next one,
`service.Identity` is what the rest of the controller calls. No SQL and no RPC here: `controller.storage.identity`,
`controller.api.enrolment_grpc` and `controller.api.policy` are the edges.
"""
