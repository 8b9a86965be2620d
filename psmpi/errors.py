"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """What was wrong, where, and what to do instead; shown without a traceback."""
