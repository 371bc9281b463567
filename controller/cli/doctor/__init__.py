"""`nanofleet doctor`: the usual misconfigurations of an operator's and of a controller's machine, with their remedies.

    command ─▶ operator_checks (credential, address, clocks)                         everywhere
             └▶ controller_checks (settings, data_dir, keys, ports, Ray, database)   where there is a data_dir

Works beside a running controller and without one; what was not looked at says why.
"""

from controller.cli.doctor.command import doctor

__all__ = ["doctor"]
