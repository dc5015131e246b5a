"""What goes wrong with a peer; its text is shown on the page as it is."""

from __future__ import annotations


class PeerError(Exception):
    """A peer could not be measured."""


class Missing(PeerError):
    """Something could not be installed."""


class Failed(PeerError):
    """A server, worker or client ended or did not answer."""
