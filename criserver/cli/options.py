"""The options that several commands have."""

from __future__ import annotations

import argparse

from criserver.config import Config, Settings, config_of, read
from criserver.errors import InvalidArgumentError

# The configuration file of the package's service.
NODES_CONFIG = "/etc/criserver/config.toml"


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option for the configuration of this node's daemon. It may stand before or after the command."""
    words = f"the daemon's configuration, with conf.d/*.toml beside it; by default {NODES_CONFIG}, if it exists"
    # No default: that of a command would replace what was given before the command.
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=words)


def add_address(parser: argparse.ArgumentParser) -> None:
    """The option for the socket of a daemon. It may stand before or after the command."""
    words = "the daemon's socket, in place of the configuration's grpc.address"
    parser.add_argument("--address", metavar="SOCKET", default=argparse.SUPPRESS, help=words)


def config_path(options: argparse.Namespace) -> str:
    """The configuration file, which need not exist where no option names it."""
    return options.config or NODES_CONFIG


def address(options: argparse.Namespace) -> str:
    """The path of the socket of the daemon. Raises InvalidArgumentError."""
    if options.address is None:
        return configuration(options).grpc_address
    path = str(options.address).removeprefix("unix://")
    if not path.startswith("/"):
        raise InvalidArgumentError(f"--address {options.address}: give the absolute path of a socket")
    return path


def settings(options: argparse.Namespace) -> Settings:
    """The settings of this node's daemon. Raises InvalidArgumentError."""
    return read(config_path(options), optional=options.config is None)


def configuration(options: argparse.Namespace) -> Config:
    """The configuration of this node's daemon. Raises InvalidArgumentError."""
    return config_of(settings(options))
