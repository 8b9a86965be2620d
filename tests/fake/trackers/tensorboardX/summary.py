"""Contents of events."""


def scalar(tag, value):
    return {"scalar": [tag, float(value)]}


def text(tag, text):
    return {"text": [tag, text]}


def hparams(settings, metrics):
    assert all(isinstance(value, (bool, int, float, str)) for value in settings.values())
    return {"experiment": sorted(metrics)}, {"settings": settings}, {"end": True}
