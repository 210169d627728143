"""What goes wrong with servers, by what can be done about it."""

from __future__ import annotations

from megatron_flowrl.config import SharedUserError, UserError


class ServerError(UserError):
    """A server that could not be started, ended, did not become ready, or cannot be used any more."""


class ReplyError(ServerError):
    """A server did not do what it was asked; the message names its address and the route."""


class Refused(ReplyError):
    """The server understood and said no (HTTP 4xx): asking again, or another server, would not help."""


class Unreachable(ReplyError):
    """No whole reply came: no connection, a connection that broke, or none in time."""


class BadReply(ReplyError):
    """A reply came, but of a server that failed (HTTP 5xx), or not in the form that was agreed."""


class Interrupted(SharedUserError):
    """Rank 0 was asked to end the run while it waited for servers; every rank raises it."""


class LeaderStopped(SharedUserError):
    """Rank 0 has met what is no user's error, and is gone: the others raise this, and can do nothing more together."""
