"""The dashboard: pages for people, made on the server, brought up to date while they are looked at.

    browser ──GET /devices──▶ pages ──▶ fleet, registry, traces, identity, signing ──▶ templates ──▶ HTML
            ──GET /dashboard/events──▶ events: "something changed" ──▶ the page asks for itself again

`pages` decodes, asks and renders; what is shown is worked out in `overview`, `device_list`, `latency` and `waterfall`,
which are pure. A page works without scripts, except for charts, live updates and actions; scripts and styles come from
`assets` of this controller only, and no page holds a script or a style of its own. Actions go to the operator's REST.
"""
