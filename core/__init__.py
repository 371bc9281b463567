"""What the controller and the edge agent both speak.

A module belongs here when both sides use it and it needs base dependencies only. Nothing here knows of either side.
"""
