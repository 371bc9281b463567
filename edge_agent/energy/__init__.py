"""What the agent's work takes in joules, by whatever this machine can tell, and by which method it was told."""
