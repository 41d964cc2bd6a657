"""The fault suite: real processes that are killed, cut off, starved and lied to, beside an undisturbed twin.

`python -m tests.faults` runs it (`make test-faults`). It knows the product only through `subject`.
"""
