"""What this agent believes: the TUF catalogue and signed assignments, verified in a process of their own."""
