"""From bytes in the store to a model that serves for good, so that no step of it can brick the machine.

    self_test   load in a child process, ask the golden inputs, judge (SelfTest)
    probation   after the switch: commit or roll back, by what was seen of the requests (pure)
    record      what must outlive the process: state in force, trials, quarantine, crash count (pure)
    journal     the record on disk, in two files of which one is always whole

Who decides when each is done is `edge_agent.reconcile`.
"""
