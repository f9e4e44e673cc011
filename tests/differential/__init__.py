"""This package beside the original: the same steps, each in its own process, must come to the same outcomes.

steps.py     what may be done, and how random sequences of it are made
worker.py    the child process that does it with the posix_ipc it finds
pair.py      runs a sequence in two workers, looks at the system after each step, and compares
intended.py  the differences that are meant to be, one by one
"""
