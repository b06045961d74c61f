"""The error a user can mend: one sentence, shown without a traceback."""


class UserError(Exception):
    """Something the user can put right. The message is one sentence: which field or file, what it was, what is allowed, what to do."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); raised between steps, so weights are restored on the way out."""
