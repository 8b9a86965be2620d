"""Events, and the mark of the start of a session."""


class SessionLog(dict):
    START = 1

    def __init__(self, status):
        super().__init__(status=status)


class Event(dict):
    def __init__(self, wall_time, step, summary=None, session_log=None):
        super().__init__(wall_time=wall_time, step=step, summary=summary, session_log=session_log)
