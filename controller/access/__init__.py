"""Who may operate: operators with roles, their secrets, and browser sessions.

    secret (nfo1.…) ──▶ authenticate ──▶ Operator            programs: sent with every request
    secret          ──▶ sign_in      ──▶ token + CSRF token  browsers: once, then `resume` by the token

`model` has the values, `store` the port to a database, `attempts` the bound on guessing, `service` what one may do.
Which role a request needs is decided in `controller.api.access_rules`.
"""
