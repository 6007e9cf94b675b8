"""A field of a dataclass of settings, with its help and its limits."""
import math
from dataclasses import field, fields


def setting(default, help, low=-math.inf, high=math.inf):
    """A field. help: for --help. low, high: the numbers that are allowed."""
    return field(default=default, metadata=dict(help=help, low=low, high=high))


def flag(name):
    """mem_n_keys -> --mem-n-keys"""
    return "--" + name.replace("_", "-")


def check_ranges(settings, limits):
    """Raise ValueError for a setting that is not within its limits: {name: (low, high)}."""
    for name, (low, high) in limits.items():
        if not low <= settings[name] <= high:  # nan fails, too
            raise ValueError(f"{flag(name)} {settings[name]}: must be from {low} to {high}")


def check_limits(settings):
    """Raise ValueError for a number outside the limits of its field."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.type not in (int, float) or value is f.default:  # which may be None
            continue
        if not isinstance(value, (int, float)):  # of a config.json that somebody changed
            raise ValueError(f"{flag(f.name)} {value!r} is not a number: give one")
        if value > f.metadata["high"]:
            raise ValueError(f"{flag(f.name)} {value} is above {f.metadata['high']}: lower it")
        if not value >= f.metadata["low"]:  # also when it is nan
            raise ValueError(f"{flag(f.name)} {value} is not at least {f.metadata['low']}: raise "
                             f"it")
