"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """What was wrong, where, and what to do instead; shown without a traceback."""


class DamagedError(UserError):
    """A file that is not what was once written: it will not get better."""
