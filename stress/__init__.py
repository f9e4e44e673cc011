"""Stress: long runs of many processes that are killed, stopped and starved, each with an invariant that must hold.

Run it as `python -m stress`; docs/stress.md explains the scenarios, README.md here how to write one.
"""

import os

if os.environ.get("STRESS_FAULT"):  # every process of a scenario imports this package, whatever made it
    from stress import faults

    faults.put_in(os.environ["STRESS_FAULT"])
