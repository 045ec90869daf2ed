"""The RateLimit header fields: what a service says of a client's quotas.

Source: draft-ietf-httpapi-ratelimit-headers-10 and -11, structured fields (RFC 9651). Of a policy `q` units come in a
window of `w` seconds; `r` units are left, and within `t` seconds there will be no more (left out where the quota is
full). The draft has no unit for rows: the policy's name says it. `oracle-burst` is ours, prefixed as the draft asks.
"""

from __future__ import annotations

from collections.abc import Sequence

from oracle_server.policy.limits import Quota, Standing
from shared.wire import protocol

_WINDOW_S = 60
_SECOND_NS = 10**9


def rate_limit_fields(standings: Sequence[Standing]) -> dict[str, str]:
    """Both header fields; none where there is no quota."""
    if not standings:
        return {}
    return {
        protocol.RATELIMIT_POLICY_HEADER: ", ".join(_policy(standing.quota) for standing in standings),
        protocol.RATELIMIT_HEADER: ", ".join(_service_limit(standing) for standing in standings),
    }


def _policy(quota: Quota) -> str:
    burst = "" if quota.burst == quota.per_minute else f";oracle-burst={quota.burst}"
    return f'"{quota.name}";q={quota.per_minute};w={_WINDOW_S}{burst}'


def _service_limit(standing: Standing) -> str:
    until = "" if standing.next_ns is None else f";t={-(-standing.next_ns // _SECOND_NS)}"
    return f'"{standing.quota.name}";r={standing.tokens}{until}'
