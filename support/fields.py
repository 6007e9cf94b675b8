"""A dataclass of settings: its fields have help and limits, and become flags."""
import argparse
import math
from dataclasses import field, fields


def setting(default, help, low=-math.inf, high=math.inf):
    """A field. help: for --help. low, high: the numbers that are allowed."""
    return field(default=default, metadata=dict(help=help, low=low, high=high))


def flag(name):
    """mem_n_keys -> --mem-n-keys"""
    return "--" + name.replace("_", "-")


def numbers(text):
    """2,4,6 -> (2, 4, 6)"""
    return tuple(int(number) for number in text.split(","))


def add_flags(parser, settings, leave_out=()):
    """Add a flag for each field of some settings, whose values are shown as defaults.

    What was not given is not in the result of parse_args. leave_out: names of fields.
    """
    for f in fields(settings):
        kind = dict(type=numbers if f.type is tuple else f.type)
        if f.type is bool:
            can_only_be_set = f.default is False
            action = "store_true" if can_only_be_set else argparse.BooleanOptionalAction
            kind = dict(action=action)
        if f.name not in leave_out:
            default = repr(getattr(settings, f.name)).strip("'")
            text = f"{f.metadata['help']} ({default})".replace("%", "%%")
            parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)


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
