"""Who may connect: the fleet's certificate authority, enrolment tokens, agents' certificates, bans."""
