"""Installs a scenario's clock in a process that the scenario's server started."""

import os

from conformance.clock import VARIABLE, SteppedClock

if VARIABLE in os.environ:
    SteppedClock(os.environ[VARIABLE]).install()
