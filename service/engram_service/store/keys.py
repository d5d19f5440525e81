"""The names of things in Redis.

    engram:{TAG}           hash    i key, m "name/version", f fingerprint, t token, h client id, e epoch, c created, l ttl (ms),
                                   n run of Redis in which it was claimed, g revision of the memory, where it has one of its own
    engram:{TAG}:TOKEN     string  the record, under the claim's token; see record.py
    engram:{TAG}:m         list    the memory's log, where there is one; see memories.py
    engram:stored:{TENANT} zset    tags of a tenant's sessions, by when they expire; see tally.py
    engram:generation:SERVER  string  what that server has written, counted; gone or behind: this Redis has lost data; see
                                   generations.py. In a cluster one on each node, engram:generation:{N}:SERVER

TAG is a hash of the session's key, which is its id where there are no tenants (auth/tenants.py), so that keys of all sessions are
equally long (a batch's commit is then one numpy array), and the braces put all keys of a session into one slot of a Redis Cluster.
"""

from __future__ import annotations

import base64
import hashlib

META_PREFIX = b"engram:{"
META_NBYTES = len(META_PREFIX) + 22 + 1
GENERATION = b"engram:generation"


def session_tag(session_id: str) -> bytes:
    """22 ASCII bytes: base64url of a 128-bit BLAKE2b."""
    return base64.urlsafe_b64encode(hashlib.blake2b(session_id.encode(), digest_size=16).digest()).rstrip(b"=")


def meta_key(tag: bytes) -> bytes:
    return META_PREFIX + tag + b"}"


def record_key(tag: bytes, token: bytes) -> bytes:
    return META_PREFIX + tag + b"}:" + token


def tally_key(tenant: str) -> bytes:
    return b"engram:stored:{" + tenant.encode() + b"}"


def memory_key(tag: bytes) -> bytes:
    return META_PREFIX + tag + b"}:m"
