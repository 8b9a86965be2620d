"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """An error of the user: says what was wrong, where, and what to do instead; shown without a traceback."""


class DamagedError(UserError):
    """A file that is not what was once written: it will not get better."""
