"""What ends a command, and the exit status that says so to a shell and to a batch system."""


class UserError(Exception):
    """Something the user can put right. The message is one sentence: which field or file, what it was, what is allowed, what to do."""

    exit_status = 2


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); raised between steps, so weights are restored on the way out."""

    exit_status = 130


class OutOfTime(Interrupted):
    """The run was told that its time is nearly up (SIGUSR1): the same command, given again, goes on."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h; a batch file requeues its job at this status


class MachineFailed(Exception):
    """The machine failed, not the work (a GPU error, a file system that is gone): a new process elsewhere or later goes on."""

    exit_status = 76
