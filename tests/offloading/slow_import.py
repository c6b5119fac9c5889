"""A module that takes its time; what else it is for is told by `chores.import_slowly`."""

import time

from asyncguard.offloading._progress import report_progress

DONE = False
report_progress(0)
time.sleep(0.3)
DONE = True
