"""The one exception whose message is shown to a person as it is, without a traceback.

Anything else that escapes is a fault of ours or of the machine, and keeps its traceback in the logs.
"""


class UserError(Exception):
    """A mistake that the user can mend: one sentence with where, what was found and what to do."""
