"""Makes what it has when it is asked for, and imports for that what is not wanted before."""


def __getattr__(name):
    if name != "Heavy":
        raise AttributeError(name)
    import zoo.heavy

    return zoo.heavy.Heavy
