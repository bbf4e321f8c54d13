"""What command-line arguments are made of, with errors that say what is wrong."""

from __future__ import annotations

import argparse

from scheduler.messages import Address
from scheduler.units import SIZES, quantity

MAX_PORT = 65535


def count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def positive(text: str) -> int:
    if (number := count(text)) == 0:
        raise argparse.ArgumentTypeError("one is the least")
    return number


def above_zero(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def port(text: str) -> int:
    number = count(text)
    if number > MAX_PORT:  # the system would take its lower 16 bits
        raise argparse.ArgumentTypeError(f"{text} is not a port: they end at {MAX_PORT}")
    return number


def address(text: str) -> Address:
    host, colon, number = text.rpartition(":")
    if not (host and colon and number.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 192.0.2.7:8100")
    return Address(host.strip("[]"), port(number))


def addresses(text: str) -> tuple[Address, ...]:
    return tuple(map(address, text.split(",")))


def size(text: str) -> int:
    try:
        return int(quantity(text, SIZES))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def sizes(text: str) -> tuple[int, ...]:
    return tuple(size(part) for part in text.split(","))
