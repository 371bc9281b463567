"""The whole system once, on this machine: every part a process of its own, as in the field.

`app` tells the story from start to end; `digits` makes the models, `processes` starts and stops the parts, `scenes` are
what the cameras do, `report` counts what came back.
"""
