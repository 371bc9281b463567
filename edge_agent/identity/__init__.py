"""Who this agent is: key, certificate and trust on disk (`folder`), how they come (`enrol`) and stay fresh (`renewal`).

Cryptography happens in `__main__`, a child process of a moment, or in the enrolment command; the running agent imports
neither `keys` nor `enrol`. Calls to the controller go through `channel`, which follows a renewal while they run.
"""
