"""Files of events."""

import json
import socket
import time


class EventsWriter:
    def __init__(self, file_prefix, filename_suffix=""):
        name = f"{file_prefix}.out.tfevents.{int(time.time())}.{socket.gethostname()}{filename_suffix}"
        self.file = open(name, "x")  # noqa: SIM115

    def write_event(self, event):
        self.file.write(json.dumps(event) + "\n")

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()
