"""May this assignment be installed? The agent's side of signatures, catalogue and time.

    SignedAssignment ─▶ desk ─▶ gate ──JSON──▶ child (`__main__`) ─▶ admission ─▶ catalogue (TUF, disk, net)
                         │                                                    └─▶ verifier (decides, pure)
                         └─▶ reconciler, and `terms` for whoever receives the manifest's bytes

The main process imports neither `tuf` nor `cryptography` (12 MB that it would hold for ever): the child does, for the
half second that a verification takes. `question` is what the two say to each other, `accepted` what they leave on disk.

An agent installs a slot that does not run yet iff: a director key that the catalogue lists signed the assignment, it
has not expired and names this agent; its manifest is a current target of the model's family; and, once the manifest's
bytes are here, its release counter is at or above the family's floor and the agent has every tag that it requires.
Slots that run go on running whatever expires or is withdrawn.
"""
