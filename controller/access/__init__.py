"""Who may operate: operators with roles, their secrets, and browser sessions."""
