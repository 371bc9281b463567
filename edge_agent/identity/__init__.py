"""Who this agent is: its key and certificate, enrolment and renewal, the channel that uses them."""
